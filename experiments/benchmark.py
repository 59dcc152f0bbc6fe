"""Measures speed and memory against other ways to do the same, in one run.

  python -m experiments.benchmark bank --help

  bank    many adapters in one batch, against a pass for each and PEFT
  step    FLOPs, bytes and memory of a step by contraction plan, for CPU or TPU
  train   a whole run from start to scores, against PEFT and plain torch

Each subcommand is a module of benchmarks with `define_flags` and
`main`. It writes results/benchmarks/NAME.json, with the versions, the hardware
and the command that its figures come from, and prints them as a table.
"""

import importlib
import sys

from absl import flags

from experiments import cli

SUBCOMMANDS = ("bank", "step", "train")


def main() -> None:
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word not in SUBCOMMANDS:
    asked = word.lstrip("-") in ("help", "h")
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)
  module = importlib.import_module(f"benchmarks.{word}")
  module.define_flags()
  flags.adopt_module_key_flags(module)  # what --help shows
  del sys.argv[1]
  cli.run(module.main, usage=module.__doc__)


if __name__ == "__main__":
  main()
