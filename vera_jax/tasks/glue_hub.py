"""GLUE's splits from the Hugging Face hub, by way of `datasets`.

The library retries for long when there is no network, so the hub is asked
once first, with a time limit, and a hub that doesn't answer is an error at
once.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vera_jax import hub
from vera_jax.data.examples import Examples
from vera_jax.errors import UserError
from vera_jax.tasks.glue_facts import GlueTask

ANSWER_SECONDS = 10.0
# Downloads that fail like this are tried again. Other errors of the library
# are about the data set itself and would come again.
_BROKE_OFF = (ConnectionError, TimeoutError, EOFError)


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


def download(source: str, name: str | None) -> Any:
  """The hub's DatasetDict of a data set, or of one of several by its name.

  Raises:
    UserError: it isn't there, or the hub can't be reached.
  """
  import datasets
  from huggingface_hub import HfApi
  from huggingface_hub.errors import RepositoryNotFoundError

  not_there = UserError(
    f"The hub has no data set {source} (or not for you), and there is no "
    "file or folder of that name. Check the name; or download the data, and "
    "name the file or the folder."
  )
  offline = datasets.config.HF_HUB_OFFLINE
  cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
  # An earlier download may serve when the hub doesn't answer.
  if not offline and not (cache / source.replace("/", "___")).is_dir():
    ask = partial(HfApi().dataset_info, source, timeout=ANSWER_SECONDS)
    error = hub.call_error(ask, seconds=1.5 * ANSWER_SECONDS)
    if isinstance(error, RepositoryNotFoundError):
      raise not_there from error
    if error is not None:
      raise hub.unreachable(source, error) from error
  fetch = partial(datasets.load_dataset, source, name)
  shown = f"{source} ({name})" if name else source
  try:
    if offline:
      return fetch()
    return hub.retry_download(fetch, shown, broken=_BROKE_OFF)
  except datasets.exceptions.DatasetNotFoundError as error:
    raise not_there from error
  except ConnectionError as error:
    raise hub.unreachable(source, error) from error
  except (OSError, ValueError, RuntimeError) as error:
    what = name or "it"
    raise UserError(f"{what} can't be loaded from {source}: {error}") from error
