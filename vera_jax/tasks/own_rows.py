"""What the tasks over a user's own rows share, whatever is learned of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.examples import Examples, estimated_tokens, take
from vera_jax.data.tables import Table, refuse_bad_rows, some
from vera_jax.errors import UserError
from vera_jax.tasks.task import Size

Splits = dict[str, Examples]


def check_own_data(config: ConfigDict, *, instead: str) -> None:
  """Refuses a config without data, and one that asks for a benchmark's file.

  Args:
    config: the run's.
    instead: what serves in place of config.predict_test, for the message.

  Raises:
    UserError: either is the case.
  """
  if "data" not in config:
    raise UserError(f"The task {config.task!r} needs the data to be known.")
  if config.get("predict_test"):
    raise UserError(f"config.predict_test is for benchmarks{instead}")


def skip_bad_rows(
  tables: Mapping[str, Table | None], data: ConfigDict
) -> tuple[dict[str, Any], list[str]]:
  """What the rows that can't be used mean for a run.

  Args:
    tables: those of each split, all of whose rows have been looked at.
    data: `skip_bad_rows` says whether the run goes on without such rows.

  Returns:
    For `Task.stored` how many are left out of each split, if any are; and
    sentences for a run's first lines.

  Raises:
    UserError: there are any and they are not to be left out; or no row is left.
  """
  named = {split: table for split, table in tables.items() if table is not None}
  if not data.skip_bad_rows or not all(t.numbers for t in named.values()):
    refuse_bad_rows(
      [*named.values()],
      advice="Mend them, or go on without them:"
      " --config.data.skip_bad_rows=True.",
    )
  bad = {split: table for split, table in named.items() if table.bad}
  if not bad:
    return {}, []
  notes = [
    f"left out: {len(table.bad):,} rows of {table.name} that can't be used, the"
    f" first one {table.bad[0][1]}"
    for table in bad.values()
  ]
  return {"skipped_rows": {s: len(t.bad) for s, t in bad.items()}}, notes


def columns_of(
  table: Table,
  named: str | Sequence[str],
  known: Iterable[tuple[str, ...]],
  *,
  label: str = "",
  question: str,
) -> tuple[str, ...]:
  """The text columns: those named, those of known names, or the only one.

  Args:
    table: has the columns.
    named: config.data.text; () where the config names none.
    known: groups of names by which columns are recognised.
    label: the label's column, which is none of them.
    question: what is not clear and how the config says it, for the message.

  Raises:
    UserError: there is not exactly one possibility.
  """
  if named:
    return (named,) if isinstance(named, str) else tuple(named)
  groups = [names for names in known if {*names} <= {*table.columns}]
  others = [name for name in table.columns if name != label]
  if not groups and len(others) == 1:
    groups = [(others[0],)]
  if len(groups) != 1:
    raise UserError(
      f"It is not clear which column {question}. The columns of {table.name}"
      f" are {some(table.columns)}."
    )
  return groups[0]


def dev_size(rows: int, data: ConfigDict) -> int:
  """How many of the rows are kept for scoring, before any are ruled out.

  Raises:
    UserError: config.data.dev_fraction is no share of them.
  """
  if not 0 < data.dev_fraction <= 0.5:
    raise UserError(
      f"config.data.dev_fraction is {data.dev_fraction}; choose a share of the"
      " rows above 0 and up to 0.5."
    )
  return max(1, round(data.dev_fraction * rows))


def keep_apart(
  examples: Examples, dev: np.ndarray, data: ConfigDict, *, how: str = ""
) -> tuple[Splits, str]:
  """The rows to train on and those of the numbers `dev`, and where these are
  from, for a run's first lines."""
  rest = np.setdiff1d(np.arange(len(examples)), dev)
  where = (
    f"{len(dev)} of the {len(examples)} training rows"
    f" (config.data.dev_fraction={data.dev_fraction}, taken by"
    f" config.data.subset_seed={data.subset_seed}{how})"
  )
  return {"train": take(examples, rest), "dev": take(examples, dev)}, where


def size_of(splits: Splits) -> Size:
  """How many examples there are, and about how many tokens each has."""
  train = splits["train"]
  texts = [*train.first, *(train.second or [])]
  return Size(
    len(train), len(splits["dev"]), estimated_tokens(texts, len(train))
  )
