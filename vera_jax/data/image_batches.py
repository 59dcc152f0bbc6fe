"""The batches of a run on images: one image per row, all of one size.

As those of texts (`loader.py`) they are a function of (seed, step) alone, the
random flips and shifts of training images included.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vera_jax.data.data import MeasureBatch, Sizes
from vera_jax.data.images import SHOWN, Prepared, Processor
from vera_jax.data.loader import stack_runs, step_batches, steps_per_epoch
from vera_jax.data.packing import WHOLE, Batch, ProcessShard
from vera_jax.errors import UserError
from vera_jax.models.family import IMAGES, Family

Images = UInt8[np.ndarray, "rows height width 3"]


class ImageData(NamedTuple):
  """A run's prepared images, and the shapes of its batches.

  Attributes:
    splits: the prepared images by split; the training split is "train".
    processor: normalises them.
    rows, eval_rows: images per microbatch in training, and in evaluation.
    batch_size: examples per step.
    flip: whether each training image is mirrored with probability one half.
    shift: the most pixels by which a training image is moved, along each axis,
      its edge being repeated: a random cut out of the enlarged image.
    shard: the rows of every batch that this process must supply.
  """

  splits: dict[str, Prepared]
  processor: Processor
  rows: int
  eval_rows: int
  batch_size: int
  flip: bool = False
  shift: int = 0
  shard: ProcessShard = WHOLE

  @property
  def epoch_steps(self) -> int:
    """Steps per epoch."""
    return steps_per_epoch(len(self.splits["train"]), self.batch_size)

  def train_batches(
    self, *, seeds: int | Sequence[int], start_step: int | Sequence[int]
  ) -> Iterator[tuple[int, tuple[Batch, ...]]]:
    """(step, its microbatches) from any step; see `loader.step_batches`."""
    all_seeds = [seeds] if isinstance(seeds, int) else list(seeds)

    def make(
      steps: list[int], batches: list[np.ndarray]
    ) -> list[tuple[Batch, ...]]:
      made = []
      for seed, step, indices in zip(all_seeds, steps, batches, strict=True):
        rng = np.random.default_rng((seed, step))
        pixels = self.varied(self.splits["train"].pixels[indices], rng)
        made.append(
          tuple(
            self._batch("train", indices[here], pixels[here], self.rows)
            for first in range(0, len(indices), self.rows)
            for here in [slice(first, first + self.rows)]
          )
        )
      return made

    return step_batches(
      len(self.splits["train"]),
      make,
      batch_size=self.batch_size,
      seeds=seeds,
      start_step=start_step,
    )

  def varied(self, images: Images, rng: np.random.Generator) -> Images:
    """Training images, each flipped and shifted at random."""
    if not self.flip and not self.shift:
      return images
    count, tall, wide = images.shape[:3]
    flips = rng.random((count, 1)) < 0.5
    moves = rng.integers(-self.shift, self.shift + 1, (count, 2))
    rows = np.clip(np.arange(tall) + moves[:, :1], 0, tall - 1)
    columns = np.clip(np.arange(wide) + moves[:, 1:], 0, wide - 1)
    if self.flip:
      columns = np.where(flips, columns[:, ::-1], columns)
    every = np.arange(count)[:, None, None]
    return images[every, rows[:, :, None], columns[:, None]]

  def train_samples(self, *, runs: int | None = None) -> Iterator[Batch]:
    """A microbatch of each shape that training has, to compile for."""
    batch = self._sample("train", self.rows)
    yield batch if runs is None else stack_runs([batch] * runs)

  def eval_sample(self) -> Batch:
    """A batch as the scored split has them, to compile for."""
    split = list(self.splits)[1]
    return self._sample(split, self.eval_rows)

  def _sample(self, split: str, rows: int) -> Batch:
    """A whole batch with one example, whatever this process supplies."""
    first = np.arange(1)
    unsharded = self._replace(shard=WHOLE)
    return unsharded._batch(split, first, self.splits[split].pixels[:1], rows)

  def eval_batches(self, split: str) -> Iterator[Batch]:
    """The whole split in its order; the last batch may have empty rows."""
    images, rows = self.splits[split], self.eval_rows
    for first in range(0, len(images), rows):
      indices = np.arange(first, min(first + rows, len(images)))
      yield self._batch(split, indices, images.pixels[indices], rows)

  def _batch(
    self,
    split: str,
    indices: Int[np.ndarray, " examples"],
    pixels: Images,
    rows: int,
  ) -> Batch:
    """The rows of this process in a batch of these examples.

    Returns:
      float32 [rows, height, width, 3] `pixel_values`, and [rows, 1] `labels`,
      `weights` (0 in an empty row) and `example` (-1 there), as texts have
      them in slots.
    """
    low, high = self.shard.bounds(rows)
    indices, pixels = indices[low:high], pixels[low:high]
    count, shape = len(indices), (high - low, 1)
    values = np.zeros((high - low, *pixels.shape[1:]), np.float32)
    values[:count] = self.processor.normalise(pixels)
    labels, example = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    weights = np.zeros(shape, np.float32)
    labels[:count, 0] = self.splits[split].labels[indices]
    example[:count, 0], weights[:count] = indices, 1
    return {
      "pixel_values": values,
      "labels": labels,
      "weights": weights,
      "example": example,
    }

  def introduction(self) -> list[str]:
    """What a run says of its data in its first lines."""
    train, size = self.splits["train"], self.processor
    lines = [
      f"data: {len(train):,} training images of {size.height} x {size.width}"
      f" pixels in {self.epoch_steps} steps per epoch, {self.rows} at once"
    ]
    for name, split in self.splits.items():
      if split.unreadable:
        shown = ", ".join(split.unreadable[:SHOWN])
        more = ", ..." if len(split.unreadable) > SHOWN else ""
        lines.append(
          f"{len(split.unreadable)} of {len(split) + len(split.unreadable)}"
          f" images in {name} can't be read and are left out: {shown}{more}"
        )
    return lines

  def record(self) -> dict[str, dict[str, Any]]:
    """What result.json says of each split."""
    return {
      name: {
        "examples": len(split),
        "unreadable": split.unreadable,
        "fingerprint": split.fingerprint,
      }
      for name, split in self.splits.items()
    }

  @property
  def sizes(self) -> Sizes:
    """The shape of a training microbatch; an image has one answer."""
    return Sizes(self.rows, self.processor.height, reads=1)

  def measured(self, split: str, measure_batch: MeasureBatch) -> np.ndarray:
    """What is measured of each image."""
    # read after the last batch is sent, so that the device never waits
    rows = [measure_batch(batch) for batch in self.eval_batches(split)]
    return np.concatenate(rows)[: len(self.splits[split]), 0]

  def labels(self, split: str) -> np.ndarray:
    return self.splits[split].labels

  def check(self, family: Family, config: Any) -> None:
    """Refuse a model that doesn't read images.

    Raises:
      UserError: saying what it reads.
    """
    if family.reads != IMAGES:
      raise UserError(
        f"config.model.name is a {config.model_type}, which reads"
        f" {family.reads}, but config.task has images."
      )
    patch, size = config.patch_size, self.processor.height
    if size < patch:
      raise UserError(
        f"Images of {size} pixels have no room for the model's patches of"
        f" {patch}: set config.data.image_size={patch} or more."
      )
