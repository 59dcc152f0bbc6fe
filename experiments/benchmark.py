"""Measures speed and memory against other ways to do the same, in one run.

  python -m experiments.benchmark bank --help

  bank    many adapters in one batch, against one pass per adapter and PEFT
  step    FLOPs, bytes and memory of a step by contraction plan, for CPU or TPU
  train   a whole run from start to scores, against PEFT and plain torch

The old name of `python -m benchmarks.bank`, `.step` and `.train`, to which it
forwards. Each writes results/benchmarks/NAME.json, with the versions, the
hardware and the command that its figures come from, and prints them as a table.
"""

import runpy
import sys

SUBCOMMANDS = ("bank", "step", "train")

if __name__ == "__main__":
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word not in SUBCOMMANDS:
    asked = word.lstrip("-") in ("help", "h")
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)
  del sys.argv[1]
  runpy.run_module(f"benchmarks.{word}", run_name="__main__", alter_sys=True)
