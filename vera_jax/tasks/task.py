"""What a task is, and the table of them.

A task says what is learned: it loads examples, makes batches of them, gives the
loss as (sum, count), and scores a model. A new task is one file with a function
that makes a `Task` from a run's config, and one line in `TASKS`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array
from ml_collections import ConfigDict

from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.errors import UserError
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.pretrained.classifier import Classifier

Batch = Mapping[str, Any]
ToTexts = Callable[..., list[tuple[str, ...]]]


class Evaluation(NamedTuple):
  """What a model reached on the dev splits.

  Attributes:
    scores: the scores by metric; the first is the one that counts, and higher
      is better.
    collapsed: whether one and the same answer is given to everything.
    finite: whether all outputs were finite numbers.
    confusion: how many examples of each class got each answer, on the first
      split; None where there are no classes, or very many.
  """

  scores: dict[str, float]
  collapsed: bool = False
  finite: bool = True
  confusion: list[list[int]] | None = None


class Size(NamedTuple):
  """How many examples a task has, by which runs are estimated.

  Attributes:
    train: the training examples.
    dev: the examples that are scored.
    tokens: the mean number of tokens per example.
  """

  train: int
  dev: int
  tokens: int


class Presentation(NamedTuple):
  """How a task is shown to people and asked by them; nothing is computed by it.

  Attributes:
    title: the task as a reader knows it; "" for its name.
    columns: the names that the text columns of input files may have, the
      preferred ones first; () where any do.
    choices: the names of an example's choices, where an example asks between
      texts, each of which the model scores; () where an example is one text.
    size: how large its data are, or None if that isn't known.
    notes: what the task found out about its data, for a run's first lines.
  """

  title: str = ""
  columns: tuple[tuple[str, ...], ...] = ()
  choices: tuple[str, ...] = ()
  size: Size | None = None
  notes: tuple[str, ...] = ()


UNTITLED = Presentation()


@runtime_checkable
class Load(Protocol):
  """Reads a run's data; called once, by every process."""

  def __call__(
    self,
    config: ConfigDict,
    folder: Path,
    *,
    shards: int = 1,
    shard: ProcessShard = WHOLE,
  ) -> TaskData:
    """Returns the examples of a run, cut to its size and ready to batch.

    Args:
      config: the run's.
      folder: the base's, which says how examples become arrays.
      shards: a batch's rows are a multiple of it: devices along "data".
      shard: which of them this process supplies.

    Raises:
      UserError: the data can't be read or used.
    """


class Task(NamedTuple):
  """A task, as functions.

  Attributes:
    name: its name as config.task has it, or one made from the data's.
    kind: what the model's outputs mean, a name in `models.kinds.KINDS`.
    labels: the labels' names in the outputs' order; () where there are none.
    score_name: the metric that counts.
    load: reads the data of a run, see `Load`.
    loss: (outputs, batch) -> (sum, count) over what the batch has to learn, so
      that microbatches and shards weigh every example, or token, alike.
    measure: (outputs, batch) -> the arrays that `evaluate` needs of a batch.
    evaluate: (measure_batch, data) -> `Evaluation`. `measure_batch` runs the
      model on a host batch and returns its `measure`d arrays.
    write_answers: (measure_batch, data) -> a function that writes the answers
      to the test splits into a folder. All processes compute them,
      the first one writes. None where the task has no such files.
    write_texts: (trained decoder, the run's folder) -> JSON values for the
      result's "test", once training has ended: `inputs`, `scores`, `missing`
      and `seconds`. The first process alone does it. After a UserError the
      result says in `missing` why there are no scores. None where no texts are
      written.
    to_texts: an example's texts, by column -> what the model reads for it, one
      text or pair per choice; a ValueError says what is wrong with the texts.
      None where the model reads the columns as they are.
    general_loss: (measure_batch, data) -> the mean loss of general texts, in
      nats per token, measured before and after training. None where there are
      no such texts.
    selects: whether a run's result is its best epoch's, or else the last one's.
    presentation: how the task is shown and asked.
    stored: further JSON values for the result and the adapter's file.
  """

  name: str
  kind: str
  labels: tuple[str, ...]
  score_name: str
  load: Load
  loss: Callable[[Any, Batch], tuple[Array, Array]]
  measure: Callable[[Any, Batch], Any]
  evaluate: Callable[[MeasureBatch, TaskData], Evaluation]
  write_answers: (
    Callable[[MeasureBatch, TaskData], Callable[[Path], None]] | None
  ) = None
  write_texts: Callable[[Classifier, Path], dict[str, Any]] | None = None
  to_texts: ToTexts | None = None
  general_loss: Callable[[MeasureBatch, TaskData], float] | None = None
  selects: bool = True
  presentation: Presentation = UNTITLED
  stored: Mapping[str, Any] = MappingProxyType({})

  @property
  def head(self) -> str:
    """The kind of head that the model needs, as families know it."""
    return KINDS[self.kind].head

  @property
  def outputs(self) -> int:
    """How many outputs the head has; 0 where it needs no new parameters."""
    return 0 if self.kind == WORDS else len(self.labels) or 1


def evaluate_splits(
  splits: Sequence[str], evaluate: Callable[[str], Evaluation]
) -> Evaluation:
  """Evaluates every dev split; the first one's first score counts.

  A further split (MNLI's mismatched one) has its name behind the metrics':
  "accuracy/validation_mismatched".
  """
  scores: dict[str, float] = {}
  first = Evaluation({})
  for split in splits:
    evaluation = evaluate(split)
    if not evaluation.finite:
      return evaluation
    ending = "" if split == splits[0] else f"/{split}"
    scores |= {name + ending: x for name, x in evaluation.scores.items()}
    if split == splits[0]:
      first = evaluation
  return first._replace(scores=scores)


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
  raise UserError(
    f"There is no task {config.task!r}. The tasks are: {', '.join(names())}."
  )


def names() -> list[str]:
  """Those of all tasks, as config.task has them."""
  modules = [importlib.import_module(f"vera_jax.tasks.{m}") for m in TASKS]
  return [name for module in modules for name in module.NAMES]


def task_named(name: str) -> Task:
  """A task that is known by its name alone, whatever its data.

  Raises:
    UserError: there is none of that name, or it needs more than its name.
  """
  return task_for(ConfigDict({"task": name}))
