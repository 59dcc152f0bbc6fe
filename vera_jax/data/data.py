"""What the training loop asks of the data that a task gives.

`PackedData` (`loader.py`) answers it for texts and `ImageData`
(`image_batches.py`) for images. A batch is a dictionary of arrays whose first
axis is its rows: the model's inputs under their own names, and what the task's
loss and measures need beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vera_jax.data.packing import Batch, ProcessShard
from vera_jax.models.family import Family

# Runs the model on a host batch and returns an array, or a tree of them, with
# an entry for each of the batch's rows.
MeasureBatch = Callable[[Batch], Any]


class Sizes(NamedTuple):
  """The shape of a usual training microbatch.

  Attributes:
    rows: how many rows it has, over all devices together.
    length: tokens of a row, or pixels of an image's side.
    reads: positions of a row that the head reads, at most.
    longest: tokens of the longest text where rows are long ones, in which many
      texts lie end to end (`long_rows.py`); otherwise None.
  """

  rows: int
  length: int
  reads: int
  longest: int | None = None


@runtime_checkable
class TaskData(Protocol):
  """The examples of a run, by split, and the batches that are made of them."""

  @property
  def shard(self) -> ProcessShard:
    """The rows of every batch that this process supplies."""

  @property
  def epoch_steps(self) -> int:
    """How many steps show every training example once."""

  @property
  def sizes(self) -> Sizes:
    """The shape of training microbatches, by which products are planned."""

  def train_batches(
    self, *, seeds: int | Sequence[int], start_step: int | Sequence[int]
  ) -> Iterator[tuple[int, tuple[Batch, ...]]]:
    """Yields (step, its microbatches) for ever, from any step.

    They are a function of seed and step alone, wherever the iterator begins.
    The step is that of the first run.

    Args:
      seeds: that of a run; or those of several runs, and then every array has
        a leading axis with an entry per run.
      start_step: the first step to yield; steps count from 0 over all epochs.
        Of several runs each may have its own, as far from its epoch's end.
    """

  def train_samples(self, *, runs: int | None = None) -> Iterator[Batch]:
    """Yields a microbatch of each shape that training has, to compile for.

    Args:
      runs: the size of the leading axis, or None for batches without one.
    """

  def eval_sample(self) -> Batch:
    """Returns a batch as the first scored split has them, to compile for."""

  def eval_batches(self, split: str) -> Iterator[Batch]:
    """Yields a whole split, each example once, in batches of one shape."""

  def measured(self, split: str, measure_batch: MeasureBatch) -> np.ndarray:
    """Returns what is measured of each of a split's examples, in their order.

    Args:
      split: the name of a scored split.
      measure_batch: gives an array with an entry for each slot of each row, or
        for texts given as words for each token of each row.

    Returns:
      An entry for each example, or for each token of all texts.
    """

  def labels(self, split: str) -> np.ndarray:
    """Returns the labels of a labelled split's examples, in their order."""

  def introduction(self) -> list[str]:
    """Returns what a run says of its data in its first lines.

    The first line has numbers of examples and shapes; the others are warnings.
    """

  def record(self) -> dict[str, dict[str, Any]]:
    """Returns what result.json says of each split, as JSON values.

    A split's "fingerprint" is a checksum of all that decides its batches.
    """

  def check(self, family: Family, config: Any) -> None:
    """Refuses a model that the examples don't fit.

    Args:
      family: the model's.
      config: the model's, as `Family.config` makes it.

    Raises:
      UserError: the message says what doesn't fit, and what to do.
    """
