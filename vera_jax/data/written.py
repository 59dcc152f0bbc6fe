"""What a run wrote for test inputs, in files beside its result.

A run that answered test inputs has them in its folder, in test/: inputs.txt and
outputs.txt with a text per line, references.txt with an empty line between the
texts of two inputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vera_jax.files import DATA, read_bytes, write_text

FOLDER = "test"
FILES = ("inputs.txt", "outputs.txt", "references.txt")


def write_written(
  folder: Path, outputs: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> None:
  """Writes the files that `read_written` and scorers of texts read.

  Args:
    folder: the run's.
    outputs: a text for each of the groups.
    groups: the references of each input.
  """
  folder /= FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  texts_of = (
    "".join(f"{one}\n" for one in groups),
    "".join(f"{' '.join(text.split())}\n" for text in outputs),
    "\n".join(
      "".join(f"{text}\n" for text in texts) for texts in groups.values()
    ),
  )
  for name, text in zip(FILES, texts_of, strict=True):
    write_text(folder / name, text)


class Written(NamedTuple):
  """What one run wrote: its text for each input, and people's texts."""

  outputs: dict[str, str]
  references: dict[str, list[str]]


def read_written(folder: Path) -> Written:
  """The texts of the run in `folder`.

  Raises:
    UserError: it has none, their inputs and references were not copied along,
      or one can't be read.
    ValueError: the files don't belong together, or are no texts.
  """
  inputs, outputs, references = (
    read_bytes(folder / FOLDER / name, inside=folder, limit=DATA).decode(
      "utf-8"
    )
    for name in FILES
  )
  names = inputs.splitlines()
  groups = [block.splitlines() for block in references.split("\n\n")]
  if not all(groups):
    raise ValueError("an input without references")
  return Written(
    dict(zip(names, outputs.splitlines(), strict=True)),
    dict(zip(names, groups, strict=True)),
  )
