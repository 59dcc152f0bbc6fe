"""The batches of a run, a function of (seed, step) alone.

So a run resumes at any step from that number: no iterator state is saved.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64

from vera_jax.data.packing import (
  WHOLE,
  Batch,
  Layout,
  Placement,
  ProcessShard,
  first_fit,
  pack_rows,
  pack_runs,
  place_all,
)
from vera_jax.data.tokens import Tokens

_AHEAD = 4  # training batches packed while a step runs


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
  epoch, place = divmod(step, steps_per_epoch(n, batch_size))
  order = epoch_order(n, seed=seed, epoch=epoch)
  return order[place * batch_size : (place + 1) * batch_size]


def train_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  batch_size: int,
  seeds: int | Sequence[int],
  start_step: int = 0,
  shard: ProcessShard = WHOLE,
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
  """Yields (step, its microbatches) for ever, from any step.

  A step's batch is `batch_indices`, whatever the start. Batches are packed
  ahead in a thread, which ends when the iterator is closed or collected.

  Args:
    seeds: one run's seed; or several, and then the arrays have a leading axis
      with an entry per run, each as it has them alone (`packing.pack_runs`).
    shard: only these rows of each microbatch are made.
  """
  own_seeds = [seeds] if isinstance(seeds, int) else list(seeds)

  def packed() -> Iterator[tuple[int, tuple[Batch, ...]]]:
    steps = steps_per_epoch(len(tokens), batch_size)
    first_epoch, skip = divmod(start_step, steps)
    for epoch in itertools.count(first_epoch):
      orders = [
        epoch_order(len(tokens), seed=seed, epoch=epoch) for seed in own_seeds
      ]
      for place in range(skip, steps):
        here = slice(place * batch_size, (place + 1) * batch_size)
        batches = [order[here] for order in orders]
        runs = pack_runs(tokens, batches, layout, shard=shard)
        if isinstance(seeds, int):
          microbatches = runs[0]
        else:
          microbatches = tuple(map(_stack, zip(*runs, strict=True)))
        yield epoch * steps + place, microbatches
      skip = 0

  batches = packed()
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


def eval_placement(tokens: Tokens, layout: Layout) -> Placement:
  """Where each example of a split goes in `eval_batches`.

  Rows are numbered through all batches.
  """
  return place_all(tokens.lengths, layout)


def eval_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  place: Placement | None = None,
  shard: ProcessShard = WHOLE,
) -> Iterator[Batch]:
  """Packs a whole split, each example once, in one static shape.

  The examples come in no particular order: `example` says which one is in a
  slot. All batches have the first row count of `layout`, which
  `choose_eval_layout` makes for a split; the last may have empty rows.

  Args:
    place: what `eval_placement` gave, if it is known already.
    shard: only these rows of each batch are made.
  """
  place = place or eval_placement(tokens, layout)
  layout = layout._replace(rows=layout.rows[:1])
  return placed_batches(tokens, place, layout, shard=shard)


def placed_batches(
  tokens: Tokens,
  place: Placement,
  layout: Layout,
  *,
  shard: ProcessShard = WHOLE,
) -> Iterator[Batch]:
  """Packs each example at its place, with the most rows allowed per batch.

  The last batch has the smallest allowed row count that is enough.
  """
  most = layout.rows[-1]
  for first in range(0, place.rows, most):
    left = place.rows - first
    rows = next((rows for rows in layout.rows if rows >= left), most)
    yield pack_rows(
      tokens,
      np.arange(len(tokens)),
      place,
      layout,
      first=first,
      last=first + rows,
      rows=rows,
      shard=shard,
    )


def sample_batch(
  tokens: Tokens, layout: Layout, *, rows: int, runs: int | None = None
) -> Batch:
  """A microbatch of that many rows with one example in it, to compile for.

  With `runs` the arrays have a leading axis of that size, as `train_batches`
  gives them for several seeds.
  """
  place = first_fit(tokens.lengths[:1], layout)
  batch = pack_rows(
    tokens, np.arange(1), place, layout, first=0, last=rows, rows=rows
  )
  return batch if runs is None else _stack([batch] * runs)


def _stack(batches: Sequence[Batch]) -> Batch:
  return {name: np.stack([b[name] for b in batches]) for name in batches[0]}
