"""GLUE's and SuperGLUE's splits, from the hub or from files, and submissions.

GLUE's tab-separated files have no quoting: a double quote is a character like
any other, and many texts hold an odd number of them. So lines are split at
tabs, by hand. Texts are kept as they are (SST-2's end in a space, as on the
hub). SuperGLUE's files have a JSON object per line.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vera_jax.data.examples import Examples
from vera_jax.data.hub_data import download, hub_table
from vera_jax.data.tables import Table, some
from vera_jax.errors import UserError
from vera_jax.files import json_lines, open_file, read_bytes, read_lines
from vera_jax.places import local_copy, place
from vera_jax.tasks.glue_facts import GlueTask

log = logging.getLogger(__name__)

LARGEST = 2**30  # bytes of a file; GLUE's have a tenth of it at most
SCORES = 0, 5  # what a regression's values go from and to
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_split(task: GlueTask, source: str | Path, split: str) -> Examples:
  """Reads one split of a task.

  Args:
    task: from `glue_facts.TASKS` or `superglue.TASKS`.
    source: a hub id such as "nyu-mll/glue", or a folder that either holds the
      files itself or a folder of the task's name that does.
    split: one of `task.splits`, in the hub's names.

  Raises:
    UserError: for a source that can't be reached or found, and for a file
      that isn't as the benchmark ships it; the message names file and line, or
      the row on the hub.
  """
  if split not in task.splits:
    raise UserError(
      f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}."
    )
  test, folder = split in task.test_splits, local_folder(source)
  if folder is not None:
    table, names = _read_file(task, folder, split), task.file_columns
    label, written = task.file_label, task.written
  else:
    table, names = _download(task, str(source), split), task.columns
    label, written = "label", tuple(range(len(task.labels)))
  rows = range(len(table.numbers))
  if not rows:
    raise UserError(f"{table.name} has no examples.")
  texts = [_column(table, name) for name in names]
  index = np.arange(len(rows))
  # the numbers that the submission must repeat
  if test or folder is None and "idx" in table.columns:
    index = _numbers(table)
  labels = None if test else _labels(table, label, written)
  if task.to_texts is None:
    second = texts[1] if len(texts) > 1 else None
    return Examples(texts[0], second, labels, index)
  pairs = []
  for row, example in zip(rows, zip(*texts, strict=True), strict=True):
    try:
      pairs.append(task.to_texts(*example))
    except ValueError as error:
      raise UserError(f"{table.place(row)}: {error}.") from error
  firsts, seconds = zip(*chain.from_iterable(pairs), strict=True)
  choices = len(pairs[0])
  return Examples([*firsts], [*seconds], labels, index, choices=choices)


def local_folder(source: str | Path) -> Path | None:
  """The folder that config.data.source names; None where it is a hub id.

  Raises:
    UserError: it is neither.
  """
  folder = local_copy(source)
  if folder.is_dir():
    return folder
  if not _HUB_ID.fullmatch(str(source)):
    raise UserError(
      f"config.data.source is {str(source)!r}: there is no such folder, and "
      "it doesn't look like a hub id (owner/name)."
    )
  return None


def file_name(split: str, *, json: bool = False) -> str:
  """The benchmark's file for a split that is named as on the hub."""
  if json:
    return split.replace("validation", "val") + ".jsonl"
  return split.replace("validation", "dev") + ".tsv"


def write_submission(
  folder: str | Path,
  task: GlueTask,
  split: str,
  predictions: np.ndarray,
  index: np.ndarray,
) -> Path:
  """Writes one test split's file for the benchmark's evaluation server.

  Args:
    folder: made when missing; all tasks' files go into one folder.
    task: whose split it is.
    split: one of `task.test_splits`; its file is RTE.tsv or MNLI-mm.tsv, say,
      or for SuperGLUE CB.jsonl with a line {"idx": …, "label": …} per example.
    predictions: [examples] class ids, or scores for regression, which are
      clipped to 0 to 5.
    index: [examples] the test file's own numbers.

  Returns:
    The file's path.

  Raises:
    UserError: the file can't be written.
    ValueError: unequal lengths, negative class ids, scores that aren't finite.
  """
  predictions, words = np.asarray(predictions), task.submitted or task.written
  if not np.isfinite(predictions).all():
    raise ValueError("predictions are not finite")
  if task.regression:
    answers = [f"{score:.3f}" for score in np.clip(predictions, *SCORES)]
  elif (predictions < 0).any():
    raise ValueError("class ids below 0")
  else:
    answers = [words[i] for i in predictions]
  numbered = zip(index.tolist(), answers, strict=True)
  if task.json_lines:
    rows = [json.dumps({"idx": i, "label": x}) + "\n" for i, x in numbered]
  else:
    rows = [f"{i}\t{answer}\n" for i, answer in numbered]
    rows.insert(0, "index\tprediction\n")
  name = task.submissions[task.test_splits.index(split)]
  path = place(folder) / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), encoding="utf-8")
  except OSError as error:
    raise UserError(f"{path} can't be written: {error.strerror}.") from error
  return path


def _download(task: GlueTask, source: str, split: str) -> Table:
  data = download(source, task.name)
  if split not in data:
    raise UserError(
      f"{source} has no split {split!r} for {task.name}; it has "
      f"{', '.join(data)}."
    )
  return hub_table(source, f"{task.name}, {split}", data[split])


def _read_file(task: GlueTask, folder: Path, split: str) -> Table:
  inside = folder / task.folder
  name = file_name(split, json=task.json_lines)
  path = (inside if inside.is_dir() else folder) / name
  if not path.exists():
    files = [file_name(name, json=task.json_lines) for name in task.splits]
    raise UserError(
      f"{path} is missing. config.data.source takes a folder with"
      f" {', '.join(files)}, or its parent with these in {task.folder}/."
    )
  test = split in task.test_splits
  if task.json_lines:
    return _read_json_lines(task, path, inside=folder, test=test)
  return _read_tsv(
    task, path, inside=folder, header=test or not task.headerless
  )


def _read_tsv(
  task: GlueTask, path: Path, *, inside: Path, header: bool
) -> Table:
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
  # not splitlines(), which also breaks at separators that texts may hold
  lines = [line.split("\t") for line in text.rstrip("\n").split("\n")]
  names = lines[0] if header else list(task.headerless)
  first = 1 if header else 0
  if lines[first:] == [[""]]:
    first += 1  # a headerless file with nothing in it
  rows, numbers = [], []
  for number, row in enumerate(lines[first:], first + 1):
    if len(row) == len(names):
      rows.append(row)
      numbers.append(number)
    elif len(row) > len(names) or not task.broken_rows:
      raise UserError(
        f"{path}:{number}: {len(row)} columns where there should be "
        f"{len(names)} ({', '.join(names)})."
      )
  if broken := len(lines) - first - len(rows):
    log.warning(
      "%s: %d rows are cut short and left out, as on the hub.", path, broken
    )
  columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
  return Table(str(path), columns, numbers)


def _read_json_lines(
  task: GlueTask, path: Path, *, inside: Path, test: bool
) -> Table:
  other = "idx" if test else task.file_label
  columns: dict[str, list[Any]] = {x: [] for x in (*task.file_columns, other)}
  numbers = []
  with open_file(path, inside=inside, limit=LARGEST) as file:
    for number, row, error in json_lines(read_lines(file, name=path)):
      for key in task.file_columns:
        if not error and key not in row:
          error = f"there is no {key!r}; the keys are {', '.join(row)}"
        elif not error and not isinstance(row[key], str):
          error = f"{key!r} is no text but {row[key]!r}"
      if error:
        raise UserError(f"{path}:{number}: {error}.")
      numbers.append(number)
      for name, values in columns.items():
        values.append(row.get(name))
  return Table(str(path), columns, numbers)


def _column(table: Table, name: str) -> list[Any]:
  if name not in table.columns:
    line = ":1" if table.lines else ""
    raise UserError(
      f"{table.name}{line}: there is no column {name!r}; the columns are"
      f" {some(table.columns)}."
    )
  return table.columns[name]


def _numbers(table: Table) -> np.ndarray:
  """The numbers int64 [examples] by which a submission names examples."""
  names = (name for name in ("idx", "id") if name in table.columns)
  name = next(names, "index")
  numbers = _column(table, name)
  for row, number in enumerate(numbers):
    digits = str(number)  # True is no number, though it is an int
    if not digits.isdecimal() or len(digits) > 19 or int(digits) >= 2**63:
      raise UserError(
        f"{table.place(row)}: {name} {number!r} is not a whole number below"
        " 2**63."
      )
  return np.array([int(number) for number in numbers], np.int64)


def _labels(table: Table, name: str, written: Sequence[Any]) -> np.ndarray:
  """Class ids [examples] int32, or where no labels are written scores float32.

  True is the label true and not 1, in JSON.
  """
  ids = {(type(label), label): id for id, label in enumerate(written)}
  labels: list[float] = []
  for row, label in enumerate(_column(table, name)):
    shown = repr(label) if isinstance(label, str) else json.dumps(label)
    if not ids:
      try:
        score = float(label)
      except (TypeError, ValueError):
        score = math.nan
      if not SCORES[0] <= score <= SCORES[1]:
        raise UserError(
          f"{table.place(row)}: score {shown} is not a number from 0 to 5."
        )
      labels.append(score)
      continue
    if isinstance(label, list | dict) or (type(label), label) not in ids:
      reasons = {"-1": "-1 marks a row without a label", "None": "missing"}
      known = [x if isinstance(x, str) else json.dumps(x) for x in written]
      raise UserError(
        f"{table.place(row)}: label {shown}"
        f" ({reasons.get(str(label), 'unknown')}). The labels are"
        f" {', '.join(known)}."
      )
    labels.append(ids[type(label), label])
  return np.array(labels, np.int32 if ids else np.float32)
