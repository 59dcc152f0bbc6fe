"""The files of the E2E NLG challenge.

  rows      microsoft/LoRA's train.txt, valid.txt and test.txt: on each line an
            input, "||" and what a person wrote for it; lines with the same
            input follow one another
  outputs   a text per line, or a table of two columns: inputs and outputs
  references  lines of texts with an empty line between inputs, or a table of
            two columns: inputs and references

Tables are read as the challenge's own scorer reads them: .csv and .tsv alike
with quotes, some letters that were decoded wrongly put right, and references
in the order of the outputs' inputs. Where every cell stands between single
quotes, as in two of the challenge's submissions (tnt1, tnt2), these are cut.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vera_jax.errors import UserError
from vera_jax.files import read_bytes
from vera_jax.places import local_copy

SPLITS = ("train", "valid", "test")
BETWEEN = "||"
TABLES = (".csv", ".tsv")
LARGEST = 2**28  # bytes of a file, also unpacked; E2E's have ten million
MISREAD = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}


class Pairs(NamedTuple):
  """Inputs and texts, in the order of their file."""

  inputs: list[str]
  texts: list[str]

  def take(self, numbers: Sequence[int]) -> "Pairs":
    return Pairs(*([side[i] for i in numbers] for side in self))

  def grouped(self) -> dict[str, list[str]]:
    """The texts of each input, in the order of the first ones."""
    groups: dict[str, list[str]] = {}
    for one, text in zip(self.inputs, self.texts, strict=True):
      groups.setdefault(one, []).append(text)
    return groups


def read_split(folder: str | Path, split: str) -> Pairs:
  """The rows of a split, from SPLIT.txt or SPLIT.txt.gz.

  Raises:
    UserError: there is neither, or a line is no row; the message names it.
  """
  path = local_copy(folder) / f"{split}.txt"
  if not path.exists() and path.with_suffix(".txt.gz").exists():
    path = path.with_suffix(".txt.gz")
  inputs, texts = [], []
  for number, line in enumerate(_lines(path, inside=path.parent), 1):
    # the sides are as they are; only the line's ends are cut
    one, between, text = line.strip().partition(BETWEEN)
    if not between or not one.strip() or not text.strip() or BETWEEN in text:
      raise UserError(
        f"{path}:{number}: a line has an input, {BETWEEN} and its text, as in"
        f" microsoft/LoRA's files."
      )
    inputs.append(one)
    texts.append(text)
  return Pairs(inputs, texts)


def read_for_scoring(
  outputs: str | Path, references: str | Path
) -> tuple[list[str], list[list[str]]]:
  """(outputs, the references of each one's input).

  Raises:
    UserError: for files that can't be read or don't belong together.
  """
  outputs, references = local_copy(outputs), local_copy(references)
  inputs, texts = _read_outputs(outputs)
  if references.suffix.lower() not in TABLES:
    groups = _read_blocks(references)
  else:
    rows = _read_table(references)
    by_input = rows.grouped()
    if inputs is None:
      groups = _neighbours(rows)
    else:
      lacking = [one for one in inputs if one not in by_input]
      if lacking:
        raise UserError(
          f"{references} has no reference for an input of {outputs}:"
          f" {lacking[0]!r}."
        )
      groups = [by_input[one] for one in inputs]
  if len(groups) == 1 < len(texts):  # no empty lines: one reference each
    groups = [[text] for text in groups[0]]
  if len(texts) != len(groups):
    raise UserError(
      f"{outputs} has {len(texts)} outputs, but {references} has references"
      f" for {len(groups)} inputs. One output for each input is needed, in the"
      " same order; an empty line stands between the references of two inputs."
    )
  return texts, groups


def _lines(path: Path, *, inside: Path | None = None) -> list[str]:
  """A file's lines, of which there is one at least; `inside` as `open_file`."""
  if not path.exists():
    raise UserError(
      f"There is no file {path}. A folder for E2E has train.txt, valid.txt and"
      " test.txt (or train.txt.gz, …) in microsoft/LoRA's form."
    )
  data = read_bytes(path, inside=inside, limit=LARGEST)
  try:
    if path.suffix == ".gz":
      # a thousand times as much may be packed into it
      with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
        data = unpacked.read(LARGEST + 1)
    text = data.decode("utf-8-sig")
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} can't be unpacked: {error}.") from error
  except UnicodeError as error:
    raise UserError(f"{path} can't be read: {error}.") from error
  if len(data) > LARGEST:
    raise UserError(
      f"{path} is not used: unpacked it has more than {LARGEST:,} bytes."
    )
  lines = text.replace("\r\n", "\n").split("\n")
  if not lines[-1]:
    lines.pop()
  if not any(line.strip() for line in lines):
    raise UserError(f"{path} is empty.")
  return lines


def _read_outputs(path: Path) -> tuple[list[str] | None, list[str]]:
  """(inputs, if the file has them; outputs). An output may be empty."""
  if path.suffix.lower() in TABLES:
    return _read_table(path)
  return None, [line.strip() for line in _lines(path)]


def _read_blocks(path: Path) -> list[list[str]]:
  """Lines, parted by empty ones."""
  groups: list[list[str]] = [[]]
  lines = [line.strip() for line in _lines(path)]
  while not lines[-1]:
    lines.pop()
  for number, line in enumerate(lines, 1):
    if line:
      groups[-1].append(line)
    elif not groups[-1]:
      raise UserError(
        f"{path}:{number}: an empty line stands between the references of two"
        " inputs, but none comes before this one."
      )
    else:
      groups.append([])
  return groups


def _read_table(path: Path) -> Pairs:
  """A header and two columns: inputs, and outputs or references."""
  lines = []
  for line in _lines(path):
    for wrong, right in MISREAD.items():
      line = line.replace(wrong, right)
    if line.strip():
      lines.append(line.strip())
  apart = "\t" if "\t" in lines[0] else ","
  try:
    header, *rows = csv.reader(lines, delimiter=apart)
  except csv.Error as error:
    raise UserError(f"{path} can't be read: {error}.") from error
  bad = [i for i, row in enumerate([header, *rows], 1) if len(row) != 2]
  if bad or not rows:
    where = f"row {bad[0]} has others" if bad else "there are no rows"
    raise UserError(
      f"{path}: a header and two columns are needed, inputs and texts; {where}."
    )
  cells = [cell for row in rows for cell in row]
  if all(len(x) > 1 and x[0] == x[-1] == "'" for x in cells):
    cells = [cell[1:-1] for cell in cells]
  return Pairs(cells[::2], cells[1::2])


def _neighbours(rows: Pairs) -> list[list[str]]:
  """The texts of rows that follow one another and have the same input."""
  groups: list[list[str]] = []
  for number, (one, text) in enumerate(zip(*rows, strict=True)):
    if not number or one != rows.inputs[number - 1]:
      groups.append([])
    groups[-1].append(text)
  return groups
