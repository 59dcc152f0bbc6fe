"""The task of a plan, as far as a training step knows it: no data are read."""

from typing import Any, NoReturn

from ml_collections import ConfigDict

from vera_jax.data.completions import Completions
from vera_jax.errors import UserError
from vera_jax.models.kinds import WORDS
from vera_jax.tasks import (
  e2e,
  e2e_texts,
  images,
  instruct,
  language_files,
  text_files,
)
from vera_jax.tasks.classification import classification
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.task import Task, task_for

WRITTEN = (*e2e.NAMES, *e2e_texts.NAMES, *instruct.NAMES, *language_files.NAMES)
LABELLED = (*text_files.NAMES, *images.NAMES)  # by the user's own data


def planned_task(config: ConfigDict, *, labels: int | None = None) -> Task:
  """The task of a run whose data need not be there.

  Args:
    config: a run's.
    labels: how many classes the data have; None reads the data, of those tasks
      whose classes are the data's own.

  Raises:
    UserError: these can't be read, or the task has no classes of the data's.
  """
  if labels is not None and config.task not in LABELLED:
    raise UserError(
      f"--labels={labels} is for the tasks {', '.join(LABELLED)}; what"
      f" {config.task} learns is known."
    )
  if config.task in WRITTEN:
    return language_modelling(
      config.task,
      read_split=_unread,
      dev_splits=("dev",),
      completions=Completions("right"),
      smoothing=config.optim.label_smoothing,
    )
  if labels is not None:
    return classification(
      config.task,
      labels=tuple(map(str, range(labels))),
      metrics=("accuracy",),
      read_split=_unread,
      dev_splits=("dev",),
    )
  return task_for(config)


def row_size(
  config: ConfigDict, fields: Any, task: Task, learned: int | None
) -> tuple[int, int]:
  """(tokens, or pixels of a side; learned places) of a row.

  Where words are learned, that is each of a row's tokens, or `learned` of them.

  Raises:
    UserError: a row has not so many.
  """
  if config.task in images.NAMES:
    return config.data.image_size or fields["image_size"], 1
  length = config.data.max_length
  if task.kind != WORDS:
    if learned is not None:
      raise UserError(
        f"--learned={learned} is for tasks that learn words; {config.task} has"
        " one label per row."
      )
    return length, 1
  if learned is not None and learned > length:
    raise UserError(
      f"--learned={learned}, but a row has {length} tokens"
      " (config.data.max_length)."
    )
  return length, learned or length


def _unread(source: str, split: str) -> NoReturn:
  raise AssertionError("A plan reads no data.")
