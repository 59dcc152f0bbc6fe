"""The old name of `python -m benchmarks.peft_steps`, to which it forwards."""

import runpy

if __name__ == "__main__":
  runpy.run_module("benchmarks.peft_steps", run_name="__main__", alter_sys=True)
