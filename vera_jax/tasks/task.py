"""What a task is, and the table of them.

A task says what is learned: it loads examples, makes batches of them, gives the
loss as (sum, count), and scores a model. A new task is one file with a function
that makes a `Task` from a run's config, and one line in `TASKS`.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array
from ml_collections import ConfigDict

from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.errors import UserError

Batch = Mapping[str, Any]
Form = Callable[..., list[tuple[str, ...]]]


class Evaluation(NamedTuple):
  """What a model reached on the dev splits.

  Attributes:
    scores: by metric; the first is the one that counts, higher is better.
    collapsed: whether one and the same answer is given to everything.
    finite: whether all outputs were finite numbers.
  """

  scores: dict[str, float]
  collapsed: bool = False
  finite: bool = True


class Size(NamedTuple):
  """Training and dev examples, and mean tokens per example: for estimates."""

  train: int
  dev: int
  tokens: int


class Task(NamedTuple):
  """A task, as functions.

  Attributes:
    name: as config.task has it.
    head, outputs: the kind of head that the model needs, as families know it,
      and how many outputs it has; 0 where it needs no new parameters.
    labels: their names in the outputs' order; () where there are none.
    kind: what the outputs mean, a name in `models.kinds.KINDS`.
    choices: the names of an example's choices, where an example asks between
      texts, each of which the model scores; () where an example is one text.
    score_name: of the score that counts.
    load: (config, base's folder, shards, process shard) -> the data, as
      `data.loader.PackedData` and `data.image_batches.ImageData` have it:
      batches from any position, and what is said of the data in a run's first
      lines and in its result.
    loss: (outputs, batch) -> (sum, count) over what the batch has to learn, so
      that microbatches and shards weigh every example, or token, alike.
    measure: (outputs, batch) -> the arrays that `evaluate` needs of a batch.
    evaluate: (measure_batch, data) -> `Evaluation`. `measure_batch` runs the
      model on a host batch and returns its `measure`d arrays.
    write_answers: (measure_batch, data, folder) -> a function that writes the
      answers to the test splits into the folder. All processes compute them,
      the first one writes. None where the task has no such files.
    write_texts: (trained decoder, the run's folder) -> JSON values for the
      result's "test", once training has ended: `inputs`, `scores`, `missing`
      and `seconds`. The first process alone does it. After a UserError the
      result says in `missing` why there are no scores. None where no texts are
      written.
    selects: whether a run's result is its best epoch's, or else the last one's.
    columns: names that the text columns of input files may have.
    form: (an example's texts, by column) -> what the model reads for it, one
      text or pair per choice; a ValueError says what is wrong with the texts.
      None: it reads the columns as they are.
    title: as a reader knows the task; "" for its name.
    size: of its data, if that is known.
    notes: what it found out about its data, for a run's first lines.
    stored: further JSON values for the result and the adapter's file.
  """

  name: str
  head: str
  outputs: int
  labels: tuple[str, ...]
  kind: str
  score_name: str
  load: Callable[..., Any]
  loss: Callable[[Any, Batch], tuple[Array, Array]]
  measure: Callable[[Any, Batch], Any]
  evaluate: Callable[..., Evaluation]
  choices: tuple[str, ...] = ()
  write_answers: Callable[..., Callable[[], None]] | None = None
  write_texts: Callable[[Any, Path], dict[str, Any]] | None = None
  selects: bool = True
  columns: tuple[tuple[str, ...], ...] = ()
  form: Form | None = None
  title: str = ""
  size: Size | None = None
  notes: tuple[str, ...] = ()
  stored: Mapping[str, Any] = MappingProxyType({})

  def load_data(
    self,
    config: ConfigDict,
    folder: Path,
    *,
    shards: int = 1,
    shard: ProcessShard = WHOLE,
  ) -> Any:
    """The data of a run; see `load`."""
    return self.load(config, folder, shards, shard)


# The modules that make tasks. Each has `NAMES` of them and `task_for(config)`,
# which gives None where config.task is not one of them.
TASKS = (
  "glue",
  "superglue",
  "text_files",
  "language_files",
  "e2e",
  "e2e_texts",
  "instruct",
  "images",
)


def task_for(config: ConfigDict) -> Task:
  """The task of a run. Where its labels come from its data, these are read.

  Raises:
    UserError: there is none of that name (the message lists the names), or its
      data can't be used.
  """
  modules = [importlib.import_module(f"vera_jax.tasks.{m}") for m in TASKS]
  for module in modules:
    task = module.task_for(config)
    if task is not None:
      return task
  names = [name for module in modules for name in module.NAMES]
  raise UserError(
    f"There is no task {config.task!r}. The tasks are: {', '.join(names)}."
  )


def task_named(name: str) -> Task:
  """A task that is known by its name alone, whatever its data.

  Raises:
    UserError: there is none of that name, or it needs more than its name.
  """
  return task_for(ConfigDict({"task": name}))
