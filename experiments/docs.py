"""The old name of `python -m benchmarks.docs`, to which it forwards."""

import runpy

if __name__ == "__main__":
  runpy.run_module("benchmarks.docs", run_name="__main__", alter_sys=True)
