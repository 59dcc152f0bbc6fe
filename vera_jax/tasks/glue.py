"""GLUE's nine tasks, as the training loop knows tasks."""

from functools import partial

from ml_collections import ConfigDict

from vera_jax.tasks.classification import classification
from vera_jax.tasks.glue_data import load_split, write_submission
from vera_jax.tasks.glue_facts import GENERATED, TASKS, GlueTask, glue_task
from vera_jax.tasks.task import Presentation, Task

NAMES = tuple(TASKS)


def task_for(config: ConfigDict) -> Task | None:
  """A GLUE task as the training loop knows tasks; None for another name."""
  name = config.task
  if name not in NAMES and name != GENERATED.name:
    return None
  return benchmark_task(name, glue_task(name))


def benchmark_task(name: str, facts: GlueTask, *, title: str = "") -> Task:
  """A task of GLUE or SuperGLUE by its facts; the title is its folder's name
  unless it says another."""
  return classification(
    name,
    labels=() if facts.choices else facts.labels,
    metrics=facts.metrics,
    read_split=partial(load_split, facts),
    dev_splits=facts.dev_splits,
    test_splits=facts.test_splits,
    write_answers=lambda folder, *answers: write_submission(
      folder, facts, *answers
    ),
    to_texts=facts.to_texts,
    presentation=Presentation(
      title=title or facts.folder,
      columns=tuple(dict.fromkeys((facts.columns, facts.file_columns))),
      choices=facts.labels if facts.choices else (),
      size=facts.size,
    ),
  )
