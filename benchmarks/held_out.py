"""Parts a GLUE task's training file, so that rates are chosen on other texts.

  python -m benchmarks.held_out --source=GLUE --out=PARTS [--task=sst2]

PARTS/rates has a training and a development file, both of training examples;
PARTS/study the rest of these and the task's own development file. Which are
which is drawn once, from seed 0.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.tasks.glue_data import file_name
from vera_jax.tasks.glue_facts import glue_task

SOURCE = flags.DEFINE_string("source", None, "GLUE's folders and files.")
OUT = flags.DEFINE_string("out", None, "The new folder.")
TASK = flags.DEFINE_string("task", "sst2", "Whose files are parted.")
TRAIN = flags.DEFINE_integer(
  "train", 1200, "Training examples for the rates: as many as the study has."
)
DEV = 872  # as many as SST-2's own development file has


def main() -> None:
  if not SOURCE.value or not OUT.value:
    raise UserError("--source and --out are needed.")
  sizes = part(
    Path(SOURCE.value), Path(OUT.value), TASK.value, train_rows=TRAIN.value
  )
  print(", ".join(f"{name}: {size:,} lines" for name, size in sizes.items()))


def part(
  source: Path, out: Path, name: str, *, train_rows: int
) -> dict[str, int]:
  """Writes both folders; the lines of each file, by its path below `out`.

  Raises:
    UserError: the files are not there, or too short to be parted.
  """
  task = glue_task(name)
  train, dev = (
    (source / task.folder / file_name(split))
    for split in ("train", "validation")
  )
  if not train.is_file() or not dev.is_file():
    raise UserError(f"{train} or {dev} is missing: --source=FOLDER of GLUE.")
  lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
  header = [] if task.headerless else [lines.pop(0)]
  if len(lines) <= train_rows + DEV:
    raise UserError(f"{train} has {len(lines):,} examples, too few to part.")
  order = np.random.default_rng(0).permutation(len(lines))
  pieces = np.split(order, [train_rows, train_rows + DEV])
  rates_train, rates_dev, study = (
    "".join([*header, *(lines[i] for i in sorted(piece))]) for piece in pieces
  )
  files = {
    f"rates/{task.folder}/{train.name}": rates_train,
    f"rates/{task.folder}/{dev.name}": rates_dev,
    f"study/{task.folder}/{train.name}": study,
    f"study/{task.folder}/{dev.name}": dev.read_text(encoding="utf-8"),
  }
  for path, text in files.items():
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_text(text, encoding="utf-8")
  return {path: text.count("\n") for path, text in files.items()}


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
