"""The old name of `python -m benchmarks.cost`, to which it forwards."""

import runpy

if __name__ == "__main__":
  runpy.run_module("benchmarks.cost", run_name="__main__", alter_sys=True)
