"""The batches of a run, a function of (seed, step) alone.

So a run resumes at any step from that number: no iterator state is saved.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from vera_jax.data.answers import COUNTS
from vera_jax.data.data import MeasureBatch, Sizes
from vera_jax.data.packing import (
  WHOLE,
  Batch,
  Layout,
  Placement,
  ProcessShard,
  pack_rows,
  pack_runs,
  per_token,
  place_all,
)
from vera_jax.data.tokens import Tokens
from vera_jax.errors import UserError
from vera_jax.models.family import TEXTS, Family


class PackedData(NamedTuple):
  """A run's tokenised splits, and the shapes that they are packed into.

  Attributes:
    tokens: the tokens of each split; the training split is "train".
    train_layout: the shapes of training microbatches.
    eval_layouts: the shape of each split's batches.
    batch_size: how many examples a step has.
    max_length: the number of tokens that texts were cut to.
    cut: the side on which they were cut, or "" where the tokenizer decides.
    shard: the rows of every batch that this process must supply.
  """

  tokens: dict[str, Tokens]
  train_layout: Layout
  eval_layouts: dict[str, Layout]
  batch_size: int
  max_length: int
  shard: ProcessShard = WHOLE
  cut: str = ""

  @property
  def epoch_steps(self) -> int:
    """Steps per epoch."""
    return steps_per_epoch(len(self.tokens["train"]), self.batch_size)

  def train_batches(
    self, *, seeds: int | Sequence[int], start_step: int | Sequence[int]
  ) -> Iterator[tuple[int, tuple[Batch, ...]]]:
    """(step, its microbatches) from any step; see `train_batches`."""
    return train_batches(
      self.tokens["train"],
      self.train_layout,
      batch_size=self.batch_size,
      seeds=seeds,
      start_step=start_step,
      shard=self.shard,
    )

  def train_samples(self, *, runs: int | None = None) -> Iterator[Batch]:
    """A microbatch of each shape that training has, to compile for."""
    for shape in self.train_layout.shapes:
      yield sample_batch(self.tokens["train"], shape, runs=runs)

  def eval_placement(self, split: str) -> Placement:
    """Where `eval_batches` puts each example."""
    tokens = self.tokens[split]
    return place_all(
      tokens.lengths, self.eval_layouts[split], reads=tokens.reads
    )

  def eval_batches(
    self, split: str, placement: Placement | None = None
  ) -> Iterator[Batch]:
    """The whole split; see `eval_batches`."""
    layout = self.eval_layouts[split]
    return eval_batches(
      self.tokens[split], layout, placement=placement, shard=self.shard
    )

  def eval_sample(self) -> Batch:
    """A batch as the first scored split has them, to compile for."""
    split = list(self.tokens)[1]
    return sample_batch(self.tokens[split], self.eval_layouts[split])

  def introduction(self) -> list[str]:
    """What a run says of its data in its first lines."""
    layout, tokens = self.train_layout, self.tokens
    lengths = sorted({shape.length for shape in layout.shapes})
    lines = [
      f"data: {len(tokens['train']):,} training examples in"
      f" {self.epoch_steps} steps per epoch, packed into"
      f" {' or '.join(map(str, layout.rows))} rows of"
      f" {' or '.join(map(str, lengths))} tokens"
    ]
    train = tokens["train"]
    if train.learned is not None:
      lines[0] += f"; {train.learned.sum():,} of {len(train.ids):,} are learned"
    cut = [
      f"{split.truncated} of {len(split.text_lengths) + len(split.left_out)} in"
      f" {name}"
      for name, split in tokens.items()
      if split.truncated
    ]
    if cut:
      side = f" on the {self.cut}" if self.cut else ""
      lines.append(f"cut at {self.max_length} tokens{side}: {', '.join(cut)}")
    for name, split in tokens.items():
      if split.left_out:
        lines.append(
          f"left out of {name}, since nothing to learn is left of them within"
          f" {self.max_length} tokens: {len(split.left_out)}, the first of them"
          f" {split.place(split.left_out[0])}"
        )
      lines += [
        f"{count} rows of {name} {COUNTS[what]}"
        for what, count in split.counts.items()
        if count
      ]
    return lines

  def record(self) -> dict[str, dict[str, Any]]:
    """What result.json says of each split."""
    return {
      name: {
        "examples": len(split),
        "truncated": split.truncated,
        "fingerprint": split.fingerprint,
        **({} if split.reads is None else {"learned": int(split.reads.sum())}),
        **({"left_out": list(split.left_out)} if split.left_out else {}),
      }
      for name, split in self.tokens.items()
    }

  @property
  def sizes(self) -> Sizes:
    """The shape of a usual training microbatch.

    A text's first token is read, or where the words are learned the tokens
    before learned ones.
    """
    layout = self.train_layout
    usual = layout.shapes[len(layout.shapes) // 2]
    reads = usual.reads or usual.slots * self.tokens["train"].choices
    longest = self._longest_text if layout.sizes else None
    return Sizes(usual.rows[0], usual.length, reads, longest)

  @property
  def _longest_text(self) -> int:
    return max(int(x.text_lengths.max()) for x in self.tokens.values())

  def measured(self, split: str, measure_batch: MeasureBatch) -> np.ndarray:
    """What is measured of each example, or of each token of texts in words."""
    tokens, placement = self.tokens[split], self.eval_placement(split)
    # read after the last batch is sent, so that the device never waits
    rows = [
      measure_batch(batch) for batch in self.eval_batches(split, placement)
    ]
    if tokens.words is not None:
      return per_token(np.concatenate(rows), tokens, placement)
    return np.concatenate(rows)[placement.row, placement.slot]

  def labels(self, split: str) -> np.ndarray:
    """The labels of a labelled split's examples."""
    labels = self.tokens[split].labels
    assert labels is not None  # an unlabelled split is not scored
    return labels

  def check(self, family: Family, config: Any) -> None:
    """Refuse a model that these texts don't fit.

    Args:
      family, config: the model's.

    Raises:
      UserError: it reads no texts, or has too few positions or words.
    """
    if family.reads != TEXTS:
      raise UserError(
        f"config.model.name is a {config.model_type}, which reads"
        f" {family.reads}, but config.task has texts."
      )
    longest = self._longest_text
    highest = max(int(x.ids.max()) for x in self.tokens.values())
    room = family.room(config)
    if longest > room:
      raise UserError(
        f"The longest text has {longest} tokens, but the model has positions"
        f" for {room}: set config.data.max_length={room} or lower."
      )
    if highest >= config.vocab_size:  # look-ups would never fail
      raise UserError(
        f"The tokenizer gave the id {highest}, but the model's vocabulary"
        f" ends before {config.vocab_size}: the two don't belong together."
      )


_AHEAD = 4  # training batches made while a step runs


def epoch_order(
  n: int, *, seed: int, epoch: int
) -> Int64[np.ndarray, " examples"]:
  """The order in which an epoch visits n examples; epochs count from 0."""
  return np.random.default_rng((seed, epoch)).permutation(n)


def steps_per_epoch(n: int, batch_size: int) -> int:
  """Steps of an epoch; the last batch may be smaller."""
  return -(-n // batch_size)


def batch_indices(
  n: int, *, batch_size: int, seed: int, step: int
) -> Int64[np.ndarray, " batch"]:
  """The examples of a step; steps count from 0 over all epochs."""
  epoch, number = divmod(step, steps_per_epoch(n, batch_size))
  order = epoch_order(n, seed=seed, epoch=epoch)
  return order[number * batch_size : (number + 1) * batch_size]


def train_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  batch_size: int,
  seeds: int | Sequence[int],
  start_step: int | Sequence[int] = 0,
  shard: ProcessShard = WHOLE,
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
  """Packs the texts of each step; see `step_batches`.

  Args:
    shard: only these rows of each microbatch are made.
  """
  return step_batches(
    len(tokens),
    lambda steps, batches: pack_runs(tokens, batches, layout, shard=shard),
    batch_size=batch_size,
    seeds=seeds,
    start_step=start_step,
  )


def step_batches(
  n: int,
  make: Callable[[list[int], list[np.ndarray]], Sequence[tuple[Batch, ...]]],
  *,
  batch_size: int,
  seeds: int | Sequence[int],
  start_step: int | Sequence[int] = 0,
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
  """Yields (step, its microbatches) for ever, from any step.

  The step is the first run's. A step's batch is `batch_indices`, whatever the
  start. Batches are made ahead in a thread, which ends when the iterator is
  closed or collected.

  Args:
    n: examples.
    make: (each run's step, the examples of its batch) -> each run's
      microbatches, in the same shapes for all runs.
    seeds: a run's seed; or those of several, and then arrays have a first axis
      with an entry per run, each as it has them alone (`packing.pack_runs`).
    start_step: of all runs, or of each; as far from the ends of their epochs.
  """
  all_seeds = [seeds] if isinstance(seeds, int) else list(seeds)
  starts = np.broadcast_to(start_step, len(all_seeds)).tolist()

  def made() -> Iterator[tuple[int, tuple[Batch, ...]]]:
    length = steps_per_epoch(n, batch_size)
    (skip,) = {start % length for start in starts}
    for passed in itertools.count():
      epochs = [start // length + passed for start in starts]
      orders = [
        epoch_order(n, seed=seed, epoch=epoch)
        for seed, epoch in zip(all_seeds, epochs, strict=True)
      ]
      for number in range(skip, length):
        here = slice(number * batch_size, (number + 1) * batch_size)
        steps = [epoch * length + number for epoch in epochs]
        runs = make(steps, [order[here] for order in orders])
        if isinstance(seeds, int):
          microbatches = runs[0]
        else:
          microbatches = tuple(map(stack_runs, zip(*runs, strict=True)))
        yield steps[0], microbatches
      skip = 0

  batches = made()
  # One thread, so that the generator runs in order and never in two places.
  worker = ThreadPoolExecutor(1, "pack batches")
  ahead = deque(worker.submit(next, batches) for _ in range(_AHEAD))
  try:
    while True:
      batch = ahead.popleft().result()
      ahead.append(worker.submit(next, batches))
      yield batch
  finally:
    worker.shutdown(cancel_futures=True)


def eval_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  placement: Placement | None = None,
  shard: ProcessShard = WHOLE,
) -> Iterator[Batch]:
  """Packs a whole split, each example once, in one static shape.

  The examples come in no particular order: `example` says which one is in a
  slot. All batches have the first row count of `layout`, which
  `choose_eval_layout` makes for a split; the last may have empty rows.

  Args:
    placement: where each example goes, if it is known already.
    shard: only these rows of each batch are made.
  """
  placement = placement or place_all(tokens.lengths, layout, reads=tokens.reads)
  layout = layout._replace(rows=layout.rows[:1])
  return placed_batches(tokens, placement, layout, shard=shard)


def placed_batches(
  tokens: Tokens,
  placement: Placement,
  layout: Layout,
  *,
  shard: ProcessShard = WHOLE,
) -> Iterator[Batch]:
  """Packs each example at its place, with the most rows allowed per batch.

  The last batch has the smallest allowed row count that is enough.
  """
  most = layout.rows[-1]
  for first in range(0, placement.rows, most):
    left = placement.rows - first
    rows = next((rows for rows in layout.rows if rows >= left), most)
    yield pack_rows(
      tokens,
      np.arange(len(tokens)),
      placement,
      layout,
      first=first,
      last=first + rows,
      rows=rows,
      shard=shard,
    )


def sample_batch(
  tokens: Tokens, layout: Layout, *, runs: int | None = None
) -> Batch:
  """An empty microbatch of the layout's first row count, to compile for.

  With `runs` the arrays have a leading axis of that size, as `train_batches`
  gives them for several seeds.
  """
  none, rows = np.arange(0), layout.rows[0]
  batch = pack_rows(
    tokens,
    none,
    Placement(none, none, none),
    layout,
    first=0,
    last=rows,
    rows=rows,
  )
  return batch if runs is None else stack_runs([batch] * runs)


def stack_runs(batches: Sequence[Batch]) -> Batch:
  """The batches of several runs, of equal shapes, on a leading axis."""
  return {name: np.stack([b[name] for b in batches]) for name in batches[0]}
