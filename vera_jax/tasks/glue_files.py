"""GLUE's own tab-separated files.

The files have no quoting: a double quote is a character like any other, and
many texts hold an odd number of them. So lines are split at tabs, by hand.
Texts are kept as they are (SST-2's end in a space, as on the hub).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vera_jax.data.examples import Examples
from vera_jax.errors import UserError
from vera_jax.tasks.glue import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
  """A file's rows, and the line that each is on, for messages."""

  path: Path
  header: list[str]
  rows: list[list[str]]
  lines: list[int]

  def column(self, name: str) -> list[str]:
    """The values below a header."""
    if name not in self.header:
      raise UserError(
        f"{self.path}:1: there is no column {name!r}; the columns are "
        f"{', '.join(self.header)}."
      )
    place = self.header.index(name)
    return [row[place] for row in self.rows]


def file_name(split: str) -> str:
  """GLUE's file of a split that has the hub's name."""
  return split.replace("validation", "dev") + ".tsv"


def read_split(task: Task, folder: Path, split: str) -> Examples:
  """Reads one split of a task from GLUE's files; see `glue.load_split`."""
  path = _find(task, folder, split)
  test = split in task.test_splits
  table = _read_table(task, path, header=test or not task.headerless)
  if not table.rows:
    raise UserError(f"{path}: the file has no examples.")
  texts = [table.column(name) for name in task.file_columns]
  return Examples(
    first=texts[0],
    second=texts[1] if len(texts) > 1 else None,
    labels=None if test else _labels(task, table),
    index=_index(table) if test else np.arange(len(table.rows)),
  )


def _find(task: Task, folder: Path, split: str) -> Path:
  """The split's file in the task's folder, or in that folder's parent."""
  inside = folder / task.folder
  home = inside if inside.is_dir() else folder
  path = home / file_name(split)
  if not path.is_file():
    names = ", ".join(file_name(name) for name in task.splits)
    raise UserError(
      f"{path} is missing. config.data.source takes a folder with {names}, "
      f"or its parent with these in {task.folder}/."
    )
  return path


def _read_text(path: Path) -> str:
  """The file without its byte order mark, line ends made equal."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    line = error.object.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"{path}:{line}: the file isn't UTF-8 (byte "
      f"0x{error.object[error.start]:02x}). Save it as UTF-8."
    ) from error
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error


def _read_table(task: Task, path: Path, *, header: bool) -> Table:
  # not splitlines(): it also breaks at separators that texts may hold
  lines = _read_text(path).rstrip("\n").split("\n")
  rows = [line.split("\t") for line in lines]
  names = rows[0] if header else list(task.headerless)
  first = 1 if header else 0
  if rows[first:] == [[""]]:
    first += 1  # a headerless file with nothing in it
  numbers = list(range(1, len(rows) + 1))
  table = Table(path, names, rows[first:], numbers[first:])
  if any(len(row) != len(names) for row in table.rows):
    return _without_broken_rows(task, table)
  return table


def _without_broken_rows(task: Task, table: Table) -> Table:
  """Leaves out rows cut short where the task has such; else an error."""
  width = len(table.header)
  kept = []
  for line, row in zip(table.lines, table.rows, strict=True):
    if len(row) == width:
      kept.append((line, row))
    elif len(row) > width or not task.broken_rows:
      raise UserError(
        f"{table.path}:{line}: {len(row)} columns where there should be "
        f"{width} ({', '.join(table.header)})."
      )
  log.warning(
    "%s: %d rows are cut short and left out, as on the hub.",
    table.path,
    len(table.rows) - len(kept),
  )
  lines, rows = [line for line, _ in kept], [row for _, row in kept]
  return Table(table.path, table.header, rows, lines)


def _labels(task: Task, table: Table) -> np.ndarray:
  values = table.column(task.file_label)
  if task.regression:
    return _scores(table, values)
  ids = {written: id for id, written in enumerate(task.written)}
  for line, value in zip(table.lines, values, strict=True):
    if value not in ids:
      reason = "unknown"
      if value == "-1":
        reason = "-1 marks a row without a label"
      raise UserError(
        f"{table.path}:{line}: label {value!r} ({reason}). The labels are "
        f"{', '.join(ids)}."
      )
  return np.array([ids[value] for value in values], np.int32)


def _scores(table: Table, values: list[str]) -> np.ndarray:
  scores = []
  for line, value in zip(table.lines, values, strict=True):
    try:
      score = float(value)
    except ValueError:
      score = float("nan")
    if not 0 <= score <= 5:
      raise UserError(
        f"{table.path}:{line}: score {value!r} is not a number from 0 to 5."
      )
    scores.append(score)
  return np.array(scores, np.float32)


def _index(table: Table) -> np.ndarray:
  """The test rows' names, which the submission repeats."""
  name = "id" if "id" in table.header else "index"
  values = table.column(name)
  for line, value in zip(table.lines, values, strict=True):
    if not value.isdecimal():
      raise UserError(
        f"{table.path}:{line}: {name} {value!r} is not a whole number."
      )
  return np.array(values, np.int64)
