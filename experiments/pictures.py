"""A grid of scored images with the answers of several runs, for looking at.

  python -m experiments.pictures RUN_OF_HEAD RUN_OF_VERA --out=grid.png

Below each image stand the runs' answers, right ones green and wrong ones red.
The runs are folders of experiments.images that were scored on the same images.
"""

from absl import flags

from experiments import cli
from vera_jax.errors import UserError, install
from vera_jax.places import place, staged

OUT = flags.DEFINE_string("out", None, "The figure's file: .png, .svg or .pdf.")
COUNT = flags.DEFINE_integer("count", 24, "Images.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Which ones.", 0)


def main(folders: list[str]) -> None:
  if not folders or not OUT.value:
    raise UserError("Name the runs' folders, and --out=FILE.")
  try:
    from vera_jax.report.pictures import picture_grid  # after the flags' errors
  except ImportError as error:
    why = f"Pictures need {error.name}: {install('report')}"
    raise UserError(why) from error

  runs, out = [place(folder) for folder in folders], place(OUT.value)
  figure = picture_grid(runs, count=COUNT.value, seed=SEED.value)
  try:
    with staged(out) as file:
      figure.savefig(file, bbox_inches="tight")
  except (OSError, ValueError) as error:
    raise UserError(f"{OUT.value} can't be written: {error}.") from error
  print(OUT.value)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
