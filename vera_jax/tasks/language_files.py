"""A user's own texts to learn to write: whole ones, or completions of prompts.

A `.txt` file has a text per line. A table (JSON lines, CSV, TSV, Parquet) has a
column of texts, or one of prompts and one of completions.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.completions import Completions
from vera_jax.data.examples import (
  Examples,
  check_dev_fraction,
  estimated_tokens,
  take,
)
from vera_jax.data.tables import BLANK, SUFFIXES, Table, read_table, some
from vera_jax.errors import UserError
from vera_jax.files import DATA, open_file, read_lines
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.task import Presentation, Size, Task

NAMES = ("language",)
# Names by which the columns of texts are found.
COLUMNS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("text",))
PLAIN = ".txt"  # a text per line


def task_for(config: ConfigDict) -> Task | None:
  """The task that a user's texts are; None where config.task has another name.

  Raises:
    UserError: the texts can't be read; the message names file and line.
  """
  if config.task not in NAMES:
    return None
  if "data" not in config:
    raise UserError(f"The task {config.task!r} needs the data to be known.")
  if config.get("predict_test"):
    raise UserError("config.predict_test is for benchmarks, not for texts.")
  data, optim = config.data, config.optim
  completions = Completions(data.cut, data.separate).checked()
  if not data.train:
    raise UserError(
      "Name the texts: config.data.train=FILE (and config.data.dev=FILE), each"
      f" with a name in {', '.join((PLAIN, *SUFFIXES))}."
    )
  path = Path(data.train).expanduser()
  table = _read(path)
  columns = _columns(table, data)
  examples = {"train": _examples(table, columns)}
  rows = len(examples["train"])
  if data.dev:
    table = _read(Path(data.dev).expanduser())
    examples["dev"] = _examples(table, columns)
    where = f"{table.name}, {len(examples['dev'])} rows"
  else:
    chosen = _dev_rows(rows, data)
    where = (
      f"{len(chosen)} of the {rows} training rows (config.data.dev_fraction="
      f"{data.dev_fraction}, taken by config.data.subset_seed="
      f"{data.subset_seed})"
    )
    rest = np.setdiff1d(np.arange(rows), chosen)
    examples["dev"] = take(examples["train"], chosen)
    examples["train"] = take(examples["train"], rest)

  def read_split(source: Any, split: str) -> Examples:
    return examples[split]

  train = examples["train"]
  tokens = estimated_tokens([*train.first, *(train.second or [])], len(train))
  learned = "all of it" if len(columns) == 1 else f"{columns[-1]} alone"
  task = language_modelling(
    f"language:{path.absolute().parent.name}"
    if path.stem == "train"
    else f"language:{path.stem}",
    read_split=read_split,
    dev_splits=("dev",),
    completions=completions,
    smoothing=optim.label_smoothing,
    presentation=Presentation(
      columns=(columns,),
      size=Size(len(train), len(examples["dev"]), tokens),
      notes=(
        f"texts: {' and '.join(columns)}; learned: {learned}",
        f"dev: {where}",
      ),
    ),
  )
  return task._replace(
    stored={
      **task.stored,
      "columns": list(columns),
      # how prompts end, for whoever asks the model later
      "separate": bool(data.separate and len(columns) > 1),
    },
  )


def _read(path: Path) -> Table:
  """A table's columns, or the lines of a plain file as the column "text"."""
  if path.suffix.lower() != PLAIN:
    return read_table(path)
  lines, numbers = [], []
  try:
    with open_file(path, inside=None, limit=DATA) as file:
      for number, line in enumerate(read_lines(file, name=path), 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if text:
          lines.append(text)
          numbers.append(number)
  except UnicodeError as error:
    raise UserError(f"{path}:{number}: it is not UTF-8.") from error
  if not lines:
    raise UserError(f"{path}: the file has no texts.")
  return Table(name=str(path), columns={"text": lines}, numbers=numbers)


def _columns(table: Table, data: ConfigDict) -> tuple[str, ...]:
  """A column of texts, or one of prompts and one of completions.

  Raises:
    UserError: there is not exactly one possibility, or no such column.
  """
  there = f"The columns of {table.name} are {some(table.columns)}."
  columns = (data.text,) if isinstance(data.text, str) else tuple(data.text)
  if not columns:
    found = [names for names in COLUMNS if set(names) <= set(table.columns)]
    if not found and len(table.columns) == 1:
      found = [tuple(table.columns)]
    if len(found) != 1:
      raise UserError(
        "It is not clear which column is to be learned: say"
        " config.data.text=NAME, or for prompts and their completions"
        f" config.data.text=\"('PROMPT','COMPLETION')\". {there}"
      )
    columns = found[0]
  if len(columns) > 2 or len({*columns}) < len(columns):
    raise UserError(
      f"config.data.text names {columns}: a column of texts is needed, or one"
      " of prompts and one of completions."
    )
  return columns


def _examples(table: Table, columns: tuple[str, ...]) -> Examples:
  """A table's texts.

  Raises:
    UserError: for a row that can't be used; the message says which.
  """
  for name in columns:
    if name not in table.columns:
      raise UserError(
        f"{table.name} has no column {name!r}; it has {some(table.columns)}."
      )
    for row, text in enumerate(table.columns[name]):
      if not isinstance(text, str):
        raise UserError(f"{table.place(row)}: {name} is no text: {text!r}.")
      if not text.strip():
        raise UserError(f"{table.place(row)}: {name}: {BLANK}.")
  first, *more = (table.columns[name] for name in columns)
  return Examples(
    first=first,
    second=more[0] if more else None,
    labels=None,
    index=np.arange(len(first)),
    places=[table.place(row) for row in range(len(table.numbers))],
  )


def _dev_rows(rows: int, data: ConfigDict) -> np.ndarray:
  """The rows that are kept for scoring, drawn by seed."""
  check_dev_fraction(data.dev_fraction)
  if rows < 2:
    raise UserError(
      "One training row can't be learned and scored: name a file of others,"
      " config.data.dev=FILE."
    )
  size = min(max(1, round(data.dev_fraction * rows)), rows // 2)
  order = np.random.default_rng(data.subset_seed).permutation(rows)
  return np.sort(order[:size])
