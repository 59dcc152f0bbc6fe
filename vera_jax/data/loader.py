"""The batches of a run, a function of (seed, step) alone.

So a run resumes at any step from that number: no iterator state is saved.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from vera_jax.data.packing import Batch, Layout, fill, pack_alike
from vera_jax.data.placement import Placement, first_fit, place_all
from vera_jax.data.portion import WHOLE, Portion
from vera_jax.data.prefetch import prefetch
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
  seed: int,
  start_step: int = 0,
  portion: Portion = WHOLE,
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
  """Yields (step, its passes) for ever, from any step.

  A step's batch is the same whatever the start; of each pass the portion's rows
  are made. Batches are packed ahead in a thread, which ends when the iterator
  is closed or collected.
  """
  steps = _pack_steps(
    tokens,
    layout,
    batch_size=batch_size,
    seeds=[seed],
    start_step=start_step,
    portion=portion,
  )
  return prefetch(((step, passes) for step, (passes,) in steps), _AHEAD)


def member_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  batch_size: int,
  seeds: Sequence[int],
  start_step: int = 0,
  portion: Portion = WHOLE,
) -> Iterator[tuple[int, tuple[Batch, ...]]]:
  """`train_batches` of several seeds, stacked along a first axis.

  Each seed's passes are those it has alone, with empty rows at the end where
  another's needs more, and an empty pass where another takes a further one.
  """
  steps = _pack_steps(
    tokens,
    layout,
    batch_size=batch_size,
    seeds=seeds,
    start_step=start_step,
    portion=portion,
  )
  return prefetch(
    (
      (step, tuple(map(_stacked, zip(*seeds, strict=True))))
      for step, seeds in steps
    ),
    _AHEAD,
  )


def _stacked(batches: Sequence[Batch]) -> Batch:
  return {name: np.stack([b[name] for b in batches]) for name in batches[0]}


def _pack_steps(
  tokens: Tokens,
  layout: Layout,
  *,
  batch_size: int,
  seeds: Sequence[int],
  start_step: int,
  portion: Portion,
) -> Iterator[tuple[int, list[tuple[Batch, ...]]]]:
  """Yields (step, the passes of each seed)."""
  steps = steps_per_epoch(len(tokens), batch_size)
  first_epoch, skip = divmod(start_step, steps)
  for epoch in itertools.count(first_epoch):
    orders = [epoch_order(len(tokens), seed=s, epoch=epoch) for s in seeds]
    for place in range(skip, steps):
      here = slice(place * batch_size, (place + 1) * batch_size)
      own = [order[here] for order in orders]
      yield epoch * steps + place, pack_alike(tokens, own, layout, portion)
    skip = 0


def eval_placement(tokens: Tokens, layout: Layout) -> Placement:
  """Where each example of a split goes in `eval_batches`.

  Rows count through all batches.
  """
  layout = layout._replace(rows=layout.rows[:1])
  return place_all(tokens.lengths, layout)


def eval_batches(
  tokens: Tokens,
  layout: Layout,
  *,
  place: Placement | None = None,
  portion: Portion = WHOLE,
) -> Iterator[Batch]:
  """Packs a whole split, each example once, in one static shape.

  The examples come in no order: `example` says which one a slot holds. All
  batches have the first row count of `layout`, which `plan_eval_layout` makes
  for a split; the last batch may have empty rows. Of each the portion's rows
  are made. `place` is `eval_placement`'s, where it is known already.
  """
  layout = layout._replace(rows=layout.rows[:1])
  place = place or eval_placement(tokens, layout)
  return placed_batches(tokens, place, layout, portion)


def placed_batches(
  tokens: Tokens,
  place: Placement,
  layout: Layout,
  portion: Portion = WHOLE,
) -> Iterator[Batch]:
  """Packs each example at its place: as many rows a batch as are allowed.

  The last batch has the smallest allowed row count that is enough.
  """
  most = layout.rows[-1]
  for first in range(0, place.rows, most):
    left = place.rows - first
    rows = next((rows for rows in layout.rows if rows >= left), most)
    yield fill(
      tokens,
      np.arange(len(tokens)),
      place,
      layout,
      first=first,
      rows=rows,
      portion=portion,
    )


def sample_batch(
  tokens: Tokens, layout: Layout, *, rows: int, members: int = 1
) -> Batch:
  """A pass of that many rows as training has it, with one example in it.

  With `members` as `member_batches` stacks them: shapes to compile for.
  """
  place = first_fit(tokens.lengths[:1], layout)
  batch = fill(tokens, np.arange(1), place, layout, first=0, rows=rows)
  return batch if members == 1 else _stacked([batch] * members)
