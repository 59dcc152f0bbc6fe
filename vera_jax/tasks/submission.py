"""Predictions in the files that GLUE's evaluation server takes."""

from pathlib import Path

import numpy as np

from vera_jax.errors import UserError
from vera_jax.tasks.glue import Task


def write_submission(
  folder: str | Path,
  task: Task,
  split: str,
  predictions: np.ndarray,
  index: np.ndarray,
) -> Path:
  """Writes one test split's file, such as RTE.tsv or MNLI-mm.tsv.

  Args:
    folder: made when missing; all tasks' files go into one folder.
    split: one of `task.test_splits`.
    predictions: [examples] class ids, or scores for regression, which are
      clipped to 0 to 5.
    index: [examples] the test file's own numbers.

  Returns:
    The file's path.
  """
  name = task.submissions[task.test_splits.index(split)]
  words = _words(task, np.asarray(predictions))
  lines = [
    f"{number}\t{word}" for number, word in zip(index, words, strict=True)
  ]
  path = Path(folder).expanduser() / name
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
      "\n".join(["index\tprediction", *lines, ""]), encoding="utf-8"
    )
  except OSError as error:
    raise UserError(f"{path} can't be written: {error.strerror}.") from error
  return path


def _words(task: Task, predictions: np.ndarray) -> list[str]:
  """The predictions as GLUE spells them."""
  if not task.regression:
    if (predictions < 0).any():
      raise ValueError("class ids below 0")
    return [task.written[i] for i in predictions]
  if not np.isfinite(predictions).all():
    raise ValueError("predictions are not finite")
  return [f"{score:.3f}" for score in np.clip(predictions, 0, 5)]
