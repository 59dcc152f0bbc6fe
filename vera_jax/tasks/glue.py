"""GLUE's nine tasks, as the training loop knows tasks."""

from ml_collections import ConfigDict

from vera_jax.tasks.classification import classification
from vera_jax.tasks.glue_data import load_split, write_submission
from vera_jax.tasks.glue_facts import GENERATED, SIZES, TASKS, glue_task
from vera_jax.tasks.task import Presentation, Task

NAMES = tuple(TASKS)


def task_for(config: ConfigDict) -> Task | None:
  """A GLUE task as the training loop knows tasks; None for another name."""
  name = config.task
  if name not in NAMES and name != GENERATED.name:
    return None
  glue = glue_task(name)
  return classification(
    name,
    labels=glue.labels,
    metrics=glue.metrics,
    read_split=lambda source, split: load_split(glue, source, split),
    dev_splits=glue.dev_splits,
    test_splits=glue.test_splits,
    write_answers=lambda folder, split, predictions, index: write_submission(
      folder, glue, split, predictions, index
    ),
    presentation=Presentation(
      title=glue.folder,
      columns=(glue.columns, glue.file_columns),
      size=SIZES[name],
    ),
  )
