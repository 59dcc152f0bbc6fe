"""GLUE's splits, from the hub or from a folder of GLUE's own files."""

import re
from pathlib import Path

from vera_jax.data.examples import Examples, subset
from vera_jax.errors import UserError
from vera_jax.tasks.glue import TASKS, Task, task_named
from vera_jax.tasks.glue_files import read_split
from vera_jax.tasks.glue_hub import download_split

__all__ = ["TASKS", "Examples", "Task", "load_split", "subset", "task_named"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_split(task: Task, source: str | Path, split: str) -> Examples:
  """Reads one split of a task.

  Args:
    task: from `TASKS`.
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
  folder = Path(source).expanduser()
  if folder.is_dir():
    return read_split(task, folder, split)
  if not _HUB_ID.fullmatch(str(source)):
    raise UserError(
      f"config.data.source is {str(source)!r}: there is no such folder, and "
      "it doesn't look like a hub id (owner/name)."
    )
  return download_split(task, str(source), split)
