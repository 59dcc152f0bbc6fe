"""GLUE's splits from the Hugging Face hub."""

from typing import NamedTuple

import numpy as np

from vera_jax.data.examples import Examples
from vera_jax.data.hub_data import download
from vera_jax.errors import UserError
from vera_jax.tasks.glue_facts import GlueTask


class Rows(NamedTuple):
  """A split's text columns, labels (None for a test), and `Examples.index`."""

  columns: list[list[str]]
  labels: np.ndarray | None
  numbers: np.ndarray


def download_split(task: GlueTask, source: str, split: str) -> Examples:
  """Reads one split of a task from the hub; see `glue_data.load_split`."""
  (first, *rest), labels, numbers = download_rows(task, source, split)
  return Examples(first, rest[0] if rest else None, labels, numbers)


def download_rows(task: GlueTask, source: str, split: str) -> Rows:
  """The columns of one split on the hub, as they are.

  Raises:
    UserError: for a source that can't be reached, and for rows that aren't the
      task's.
  """
  data = download(source, task.name)
  if split not in data:
    raise UserError(
      f"{source} has no split {split!r} for {task.name}; it has "
      f"{', '.join(data)}."
    )
  rows = data[split]
  place = f"{source} ({task.name}, {split})"
  if not len(rows):
    raise UserError(f"{place} has no examples.")
  test = split in task.test_splits
  for name in task.columns if test else (*task.columns, "label"):
    if name not in rows.column_names:
      raise UserError(
        f"{place} has no column {name!r}; it has "
        f"{', '.join(rows.column_names)}."
      )
  labels = None
  if not test:
    labels = np.array(rows["label"], np.float64)
    low, high = (0, 5) if task.regression else (0, len(task.labels) - 1)
    wrong = np.flatnonzero(~((labels >= low) & (labels <= high)))
    if wrong.size:
      found = labels[wrong[0]]
      reason = " (-1 marks a row without a label)" if found == -1 else ""
      raise UserError(
        f"{place}: row {wrong[0]} has label {found:g}{reason}; labels go from "
        f"{low} to {high}."
      )
    labels = labels.astype(np.float32 if task.regression else np.int32)
  has_index = "idx" in rows.column_names
  return Rows(
    columns=[list(rows[name]) for name in task.columns],
    labels=labels,
    numbers=np.array(rows["idx"] if has_index else range(len(rows)), np.int64),
  )
