"""The old name of `python -m tests.tours.run`, to which it forwards."""

import runpy

if __name__ == "__main__":
  runpy.run_module("tests.tours.run", run_name="__main__", alter_sys=True)
