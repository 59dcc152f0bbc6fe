"""A grid of scored images with the answers of several runs, for looking at.

  python -m experiments.pictures RUN_OF_HEAD RUN_OF_VERA --out=grid.png

Below each image stand the runs' answers, right ones green and wrong ones red.
The runs are folders of experiments.images that were scored on the same images.
"""

from pathlib import Path

from absl import flags

from experiments import cli
from vera_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "The figure's file: .png, .svg or .pdf.")
COUNT = flags.DEFINE_integer("count", 24, "Images.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Which ones.", 0)


def main(folders: list[str]) -> None:
  if not folders or not OUT.value:
    raise UserError("Name the runs' folders, and --out=FILE.")
  from vera_jax.report.pictures import picture_grid  # after the flags' errors

  places = [Path(folder).expanduser() for folder in folders]
  figure = picture_grid(places, count=COUNT.value, seed=SEED.value)
  try:
    figure.savefig(OUT.value, bbox_inches="tight")
  except (OSError, ValueError) as error:
    raise UserError(f"{OUT.value} can't be written: {error}.") from error
  print(OUT.value)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
