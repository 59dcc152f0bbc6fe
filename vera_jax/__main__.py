"""The command vera-jax, which is also `python -m vera_jax`.

The commands and their configs are the folders `experiments` and `configs`. An
installed package has them below itself, so that they don't meet folders of
these names elsewhere; a checkout has them beside it.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = HERE / "_commands"


def main() -> None:
  """Run the command that the words of the command line name."""
  folder = INSTALLED if INSTALLED.is_dir() else HERE.parent
  sys.path.insert(0, str(folder))
  runpy.run_module("experiments.console", run_name="__main__")


if __name__ == "__main__":
  main()
