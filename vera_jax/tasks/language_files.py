"""A user's own texts to learn to write: whole ones, or completions of prompts.

A `.txt` file has a text per line. A table (JSON lines, CSV, TSV, Parquet) has a
column of texts, or one of prompts and one of completions.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.completions import Completions
from vera_jax.data.examples import Examples, take
from vera_jax.data.tables import (
  BLANK,
  SUFFIXES,
  Table,
  read_table,
  refuse_bad_rows,
  some,
)
from vera_jax.errors import UserError
from vera_jax.files import DATA, open_file, read_lines
from vera_jax.places import local_copy
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.own_rows import (
  check_own_data,
  columns_of,
  dev_size,
  keep_apart,
  size_of,
  skip_bad_rows,
)
from vera_jax.tasks.task import Presentation, Task

NAMES = ("language",)
# Names by which the columns of texts are found.
COLUMNS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("text",))
PLAIN = ".txt"  # a text per line
GENERAL_TEXTS = 100  # that are measured, the first ones of a file


def task_for(config: ConfigDict) -> Task | None:
  """The task that a user's texts are; None where config.task has another name.

  Raises:
    UserError: the texts can't be read; the message names file and line.
  """
  if config.task not in NAMES:
    return None
  check_own_data(config, instead=", not for texts.")
  data, optim = config.data, config.optim
  completions = Completions(data.cut, data.separate).checked()
  if not data.train:
    raise UserError(
      "Name the texts: config.data.train=FILE (and config.data.dev=FILE), each"
      f" with a name in {', '.join((PLAIN, *SUFFIXES))}."
    )
  path = local_copy(data.train)
  table = _read(path)
  columns = _columns(table, data)
  table, train = _examples(table, columns)
  examples, dev_table = {"train": train}, None
  if data.dev:
    dev_table = _read(local_copy(data.dev))
    dev_table, examples["dev"] = _examples(dev_table, columns)
  stored, skipped = skip_bad_rows({"train": table, "dev": dev_table}, data)
  if dev_table is not None:
    where = f"{dev_table.name}, {len(examples['dev'])} rows"
  else:
    rows = len(examples["train"])
    examples, where = keep_apart(examples["train"], _dev_rows(rows, data), data)

  def read_split(source: Any, split: str) -> Examples:
    return examples[split]

  learned = "all of it" if len(columns) == 1 else f"{columns[-1]} alone"
  task = language_modelling(
    f"language:{path.absolute().parent.name}"
    if path.stem == "train"
    else f"language:{path.stem}",
    read_split=read_split,
    dev_splits=("dev",),
    completions=completions,
    smoothing=optim.label_smoothing,
    general=general_texts(data),
    presentation=Presentation(
      columns=(columns,),
      size=size_of(examples),
      notes=(
        f"texts: {' and '.join(columns)}; learned: {learned}",
        f"dev: {where}",
        *skipped,
      ),
    ),
  )
  return task._replace(
    stored={
      **task.stored,
      **stored,
      "columns": list(columns),
      # how prompts end, for whoever asks the model later
      "separate": bool(data.separate and len(columns) > 1),
    },
  )


def general_texts(data: ConfigDict) -> Examples | None:
  """The texts that config.data.general names, if it names any.

  Raises:
    UserError: they can't be read; the message names file and line.
  """
  if data.get("general") is None:
    return None
  table, examples = _examples(_read(local_copy(data.general)), ("text",))
  refuse_bad_rows([table])
  return take(examples, np.arange(min(len(examples), GENERAL_TEXTS)))


def _read(path: Path) -> Table:
  """A table's columns, or the lines of a plain file as the column "text"."""
  if path.suffix.lower() != PLAIN:
    return read_table(path, strict=False)
  lines: list[str] = []
  numbers: list[int] = []
  bad: list[tuple[int, str]] = []
  with open_file(path, inside=None, limit=DATA) as file:
    for number, line in enumerate(read_lines(file, name=path), 1):
      try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
      except UnicodeError:
        bad.append((number, f"{path}:{number}: it is not UTF-8."))
        continue
      if text:
        lines.append(text)
        numbers.append(number)
  if not lines and not bad:
    raise UserError(f"{path}: the file has no texts.")
  return Table(str(path), {"text": lines}, numbers, bad=tuple(bad))


def _columns(table: Table, data: ConfigDict) -> tuple[str, ...]:
  """A column of texts, or one of prompts and one of completions.

  Raises:
    UserError: there is not exactly one possibility, or no such column.
  """
  columns = columns_of(
    table,
    data.text,
    COLUMNS,
    question="is to be learned: say config.data.text=NAME, or for prompts and"
    " their completions config.data.text=\"('PROMPT','COMPLETION')\"",
  )
  if len(columns) > 2 or len({*columns}) < len(columns):
    raise UserError(
      f"config.data.text names {columns}: a column of texts is needed, or one"
      " of prompts and one of completions."
    )
  return columns


def _examples(table: Table, columns: tuple[str, ...]) -> tuple[Table, Examples]:
  """A table's texts, and the table of the rows that have them.

  Raises:
    UserError: it has not all of the columns.
  """
  for name in columns:
    if name not in table.columns:
      raise UserError(
        f"{table.name} has no column {name!r}; it has {some(table.columns)}."
      )

  def read(row: int) -> list[str]:
    texts = [table.columns[name][row] for name in columns]
    for name, text in zip(columns, texts, strict=True):
      if not isinstance(text, str):
        raise UserError(f"{table.place(row)}: {name} is no text: {text!r}.")
      if not text.strip():
        raise UserError(f"{table.place(row)}: {name}: {BLANK}.")
    return texts

  table, rows = table.read_each(read)
  return table, Examples(
    first=[texts[0] for texts in rows],
    second=[texts[1] for texts in rows] if len(columns) > 1 else None,
    labels=None,
    index=np.arange(len(rows)),
    places=[table.place(row) for row in range(len(rows))],
  )


def _dev_rows(rows: int, data: ConfigDict) -> np.ndarray:
  """The rows that are kept for scoring, drawn by seed."""
  size = dev_size(rows, data)
  if rows < 2:
    raise UserError(
      "One training row can't be learned and scored: name a file of others,"
      " config.data.dev=FILE."
    )
  order = np.random.default_rng(data.subset_seed).permutation(rows)
  return np.sort(order[: min(size, rows // 2)])
