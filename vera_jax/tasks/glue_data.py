"""GLUE's splits, from the hub or from GLUE's own files, and its submissions.

GLUE's tab-separated files have no quoting: a double quote is a character like
any other, and many texts hold an odd number of them. So lines are split at
tabs, by hand. Texts are kept as they are (SST-2's end in a space, as on the
hub).
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vera_jax.data.examples import Examples
from vera_jax.data.tables import some
from vera_jax.errors import UserError
from vera_jax.files import read_bytes
from vera_jax.tasks.glue_facts import GlueTask
from vera_jax.tasks.glue_hub import download_split

log = logging.getLogger(__name__)

LARGEST = 2**30  # bytes of a file; GLUE's have a tenth of it at most
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_split(task: GlueTask, source: str | Path, split: str) -> Examples:
  """Reads one split of a task.

  Args:
    task: from `glue.TASKS`.
    source: a hub id such as "nyu-mll/glue", or a folder that either holds
      `train.tsv` itself or a folder of the task's name that does.
    split: one of `task.splits`, in the hub's names.

  Raises:
    UserError: for a source that can't be reached or found, and for a file
      that isn't as GLUE ships it; the message names file and line.
  """
  if split not in task.splits:
    raise UserError(
      f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}."
    )
  folder = local_folder(source)
  if folder is not None:
    return _read_split(task, folder, split)
  return download_split(task, str(source), split)


def local_folder(source: str | Path) -> Path | None:
  """The folder that config.data.source names; None where it is a hub id.

  Raises:
    UserError: it is neither.
  """
  folder = Path(source).expanduser()
  if folder.is_dir():
    return folder
  if not _HUB_ID.fullmatch(str(source)):
    raise UserError(
      f"config.data.source is {str(source)!r}: there is no such folder, and "
      "it doesn't look like a hub id (owner/name)."
    )
  return None


def file_name(split: str) -> str:
  """GLUE's file for a split that is named as on the hub."""
  return split.replace("validation", "dev") + ".tsv"


def write_submission(
  folder: str | Path,
  task: GlueTask,
  split: str,
  predictions: np.ndarray,
  index: np.ndarray,
) -> Path:
  """Writes one test split's file for GLUE's evaluation server.

  Args:
    folder: made when missing; all tasks' files go into one folder.
    split: one of `task.test_splits`; its file is RTE.tsv or MNLI-mm.tsv, say.
    predictions: [examples] class ids, or scores for regression, which are
      clipped to 0 to 5.
    index: [examples] the test file's own numbers.

  Returns:
    The file's path.

  Raises:
    UserError: the file can't be written.
    ValueError: unequal lengths, negative class ids, scores that aren't finite.
  """
  predictions = np.asarray(predictions)
  if task.regression:
    if not np.isfinite(predictions).all():
      raise ValueError("predictions are not finite")
    words = [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]
  else:
    if (predictions < 0).any():
      raise ValueError("class ids below 0")
    words = [task.written[i] for i in predictions]
  rows = [f"{i}\t{word}\n" for i, word in zip(index, words, strict=True)]
  name = task.submissions[task.test_splits.index(split)]
  path = Path(folder).expanduser() / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(["index\tprediction\n", *rows]), encoding="utf-8")
  except OSError as error:
    raise UserError(f"{path} can't be written: {error.strerror}.") from error
  return path


class _Table(NamedTuple):
  """A file's rows, and the line that each is on, for error messages."""

  path: Path
  header: list[str]
  rows: list[list[str]]
  lines: list[int]

  def column(self, name: str) -> list[str]:
    """The values below a header."""
    if name not in self.header:
      raise UserError(
        f"{self.path}:1: there is no column {name!r}; the columns are "
        f"{some(self.header)}."
      )
    place = self.header.index(name)
    return [row[place] for row in self.rows]


def _read_split(task: GlueTask, folder: Path, split: str) -> Examples:
  inside = folder / task.folder
  path = (inside if inside.is_dir() else folder) / file_name(split)
  if not path.exists():
    names = ", ".join(file_name(name) for name in task.splits)
    raise UserError(
      f"{path} is missing. config.data.source takes a folder with {names}, "
      f"or its parent with these in {task.folder}/."
    )
  test = split in task.test_splits
  header = test or not task.headerless
  table = _read_table(task, path, inside=folder, header=header)
  if not table.rows:
    raise UserError(f"{path}: the file has no examples.")
  texts = [table.column(name) for name in task.file_columns]
  index = np.arange(len(table.rows))
  if test:  # the numbers that the submission must repeat
    name = "id" if "id" in table.header else "index"
    numbers = table.column(name)
    for line, number in zip(table.lines, numbers, strict=True):
      if not number.isdecimal() or len(number) > 18:  # digits of an int64
        raise UserError(
          f"{path}:{line}: {name} {number!r} is not a whole number."
        )
    index = np.array(numbers, np.int64)
  return Examples(
    first=texts[0],
    second=texts[1] if len(texts) > 1 else None,
    labels=None if test else _labels(task, table),
    index=index,
  )


def _read_table(
  task: GlueTask, path: Path, *, inside: Path, header: bool
) -> _Table:
  data = read_bytes(path, inside=inside, limit=LARGEST)
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = error.object.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"{path}:{line}: the file isn't UTF-8 (byte "
      f"0x{error.object[error.start]:02x}). Save it as UTF-8."
    ) from error
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  # Not splitlines(): it also breaks at separators that texts may hold.
  rows = [line.split("\t") for line in text.rstrip("\n").split("\n")]
  names = rows[0] if header else list(task.headerless)
  first = 1 if header else 0
  if rows[first:] == [[""]]:
    first += 1  # a headerless file with nothing in it
  table = _Table(path, names, [], [])
  for line, row in enumerate(rows[first:], first + 1):
    if len(row) == len(names):
      table.rows.append(row)
      table.lines.append(line)
    elif len(row) > len(names) or not task.broken_rows:
      raise UserError(
        f"{path}:{line}: {len(row)} columns where there should be "
        f"{len(names)} ({', '.join(names)})."
      )
  broken = len(rows) - first - len(table.rows)
  if broken:
    log.warning(
      "%s: %d rows are cut short and left out, as on the hub.", path, broken
    )
  return table


def _labels(task: GlueTask, table: _Table) -> np.ndarray:
  """Class ids [examples] int32, or scores float32."""
  ids = {written: id for id, written in enumerate(task.written)}
  labels: list[float] = []
  for line, word in zip(
    table.lines, table.column(task.file_label), strict=True
  ):
    if task.regression:
      try:
        label = float(word)
      except ValueError:
        label = float("nan")
      if not 0 <= label <= 5:
        raise UserError(
          f"{table.path}:{line}: score {word!r} is not a number from 0 to 5."
        )
      labels.append(label)
    elif word in ids:
      labels.append(ids[word])
    else:
      missing = "-1 marks a row without a label"
      reason = missing if word == "-1" else "unknown"
      raise UserError(
        f"{table.path}:{line}: label {word!r} ({reason}). The labels are "
        f"{', '.join(ids)}."
      )
  return np.array(labels, np.float32 if task.regression else np.int32)
