"""GLUE's splits from the Hugging Face hub, by way of `datasets`.

The library retries for long when there is no network, so the hub is asked
once first, with a limit, and a hub that doesn't answer is an error at once.
"""

from functools import partial
from pathlib import Path

import numpy as np

from vera_jax import hub
from vera_jax.data.examples import Examples
from vera_jax.errors import UserError
from vera_jax.tasks.glue import Task

ANSWER_SECONDS = 10.0
# Other errors of the library are about the data set, and come again.
_BROKE_OFF = (ConnectionError, TimeoutError, EOFError)


def download_split(task: Task, source: str, split: str) -> Examples:
  """Reads one split of a task from the hub; see `glue.load_split`."""
  data = _download(task, source)
  if split not in data:
    raise UserError(
      f"{source} has no split {split!r} for {task.name}; it has "
      f"{', '.join(data)}."
    )
  rows = data[split]
  place = f"{source} ({task.name}, {split})"
  if not len(rows):
    raise UserError(f"{place} has no examples.")
  _need_columns(rows, task.columns, place)
  texts = [list(rows[name]) for name in task.columns]
  test = split in task.test_splits
  has_index = "idx" in rows.column_names
  return Examples(
    first=texts[0],
    second=texts[1] if len(texts) > 1 else None,
    labels=None if test else _labels(task, rows, place),
    index=np.array(rows["idx"] if has_index else range(len(rows)), np.int64),
  )


def _need_columns(rows, names: tuple[str, ...], place: str) -> None:
  for name in names:
    if name not in rows.column_names:
      raise UserError(
        f"{place} has no column {name!r}; it has "
        f"{', '.join(rows.column_names)}."
      )


def _labels(task: Task, rows, place: str) -> np.ndarray:
  """Class ids or scores, checked against the task's range."""
  _need_columns(rows, ("label",), place)
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
  return labels.astype(np.float32 if task.regression else np.int32)


def _download(task: Task, source: str):
  """The hub's DatasetDict of one task."""
  import datasets

  if not datasets.config.HF_HUB_OFFLINE and not _stored(source):
    _ask(source)
  fetch = partial(datasets.load_dataset, source, task.name)
  try:
    if datasets.config.HF_HUB_OFFLINE:
      return fetch()
    return hub.retry_download(
      fetch, f"{source} ({task.name})", broken=_BROKE_OFF
    )
  except datasets.exceptions.DatasetNotFoundError as error:
    raise _not_there(source) from error
  except ConnectionError as error:
    raise hub.unreachable(source, error) from error
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(
      f"{task.name} can't be loaded from {source}: {error}"
    ) from error


def _stored(source: str) -> bool:
  """Whether an earlier download may serve when the hub doesn't answer."""
  from datasets import config

  folder = Path(config.HF_DATASETS_CACHE).expanduser()
  return (folder / source.replace("/", "___")).is_dir()


def _ask(source: str) -> None:
  """Raises a UserError unless the hub knows the data set."""
  from huggingface_hub import HfApi
  from huggingface_hub.errors import RepositoryNotFoundError

  ask = partial(HfApi().dataset_info, source, timeout=ANSWER_SECONDS)
  error = hub.call_error(ask, seconds=1.5 * ANSWER_SECONDS)
  if isinstance(error, RepositoryNotFoundError):
    raise _not_there(source) from error
  if error is not None:
    raise hub.unreachable(source, error) from error


def _not_there(source: str) -> UserError:
  return UserError(
    f"The hub has no data set {source} (or not for you), and there is no "
    "folder of that name. config.data.source takes a hub id, or a folder "
    "with GLUE's files."
  )
