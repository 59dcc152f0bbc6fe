"""Chooses the shapes of packed batches from the lengths of a data set.

XLA compiles each shape anew, and a padding token costs as much as a real one.
The choice weighs the two over the length of the run: a short run gets one
shape, a long one three, the smallest of which serves as the further microbatch
that an unusually long batch needs (`packing.rows_of_microbatches`). So any
batch fits.
"""

import numpy as np
from jaxtyping import Int64

from vera_jax.data.packing import Layout, microbatch_cost, place_all
from vera_jax.errors import UserError

_MULTIPLE = 8  # row lengths are multiples of it
_STRETCH = 2  # the longest row length tried, in longest examples
_LENGTHS = 10  # how many row lengths are tried, at least
_SAMPLE = 512  # batches that are looked at
_SMALL = 4  # rows of a further microbatch: up to so many, or as a batch needs
_ATTENTION = 1 / 2048  # a row of 2048 costs as much again for attention
_COMPILE = 6000  # tokens that one CPU core trains on while a shape compiles


def choose_layout(
  lengths: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  epochs: int = 1,
  shards: int = 1,
  seed: int = 0,
) -> Layout:
  """Chooses row length and row counts for random batches of these lengths.

  A sample of batches is packed into rows of several lengths. The cheapest
  layout wins, by the tokens that the whole run processes, with a surcharge for
  longer rows (attention), each further microbatch and each shape (compiling).

  Args:
    lengths: tokens of every example, those of the other splits too when
      they are to be packed by the same layout.
    batch_size: examples in a batch.
    epochs: how often the run sees the examples.
    shards: every row count is a multiple of it: devices along "data".

  Returns:
    A layout of one to three row counts.
  """
  batch_size = min(batch_size, len(lengths))
  steps = max(1, epochs * len(lengths) // batch_size)
  # Lengths of shuffled batches [batches, batch_size], longest first in each.
  rng = np.random.default_rng(seed)
  per_epoch = len(lengths) // batch_size
  orders = [
    rng.permutation(lengths)[: per_epoch * batch_size]
    for _ in range(-(-_SAMPLE // per_epoch))
  ]
  sample = np.concatenate(orders).reshape(-1, batch_size)[:_SAMPLE]
  sample = -np.sort(-sample, axis=1)
  candidates = []
  for length in _row_lengths(lengths):
    needed, slots = _rows_needed(sample, length)
    token_cost = 1 + length * _ATTENTION
    cost, rows = _choose_row_counts(
      round_up(needed, shards),
      length,
      shards=shards,
      compiling=_COMPILE / token_cost / steps,
    )
    candidates.append((cost * token_cost, Layout(rows, length, slots)))
  return min(candidates)[1]


def choose_eval_layout(
  lengths: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  shards: int = 1,
) -> Layout:
  """One shape for a whole split: about `batch_size` examples per batch.

  The row count is such that the last batch is as full as the others.
  """
  length = _row_lengths(lengths)[0]
  # Twice the usual number, so that the shortest texts don't crowd one row.
  slots = min(len(lengths), int(np.ceil(2 * length / np.mean(lengths))))
  layout = Layout((), length, slots)
  needed = place_all(lengths, layout).rows
  batches = max(1, round(len(lengths) / batch_size))
  return layout._replace(rows=(round_up(-(-needed // batches), shards),))


def limit_rows(layout: Layout, rows: int, *, shards: int = 1) -> Layout:
  """The layout with at most `rows` rows in a microbatch, to save memory.

  Raises:
    UserError: there are fewer rows than shards of the batch.
  """
  most = rows_per_shard(rows, shards) * shards
  kept = {min(count, most) for count in layout.rows}
  return layout._replace(rows=tuple(sorted(kept)))


def rows_per_shard(rows: int, shards: int) -> int:
  """How many of a microbatch's rows each shard may have.

  Raises:
    UserError: there are fewer rows than shards.
  """
  if rows < shards:
    raise UserError(
      f"config.optim.microbatch_rows is {rows}, but a microbatch has at least"
      f" one row for each of the mesh's {shards} batch shards."
    )
  return rows // shards


def _row_lengths(lengths: np.ndarray) -> list[int]:
  """Row lengths to try: from the longest example to `_STRETCH` times it."""
  shortest = int(round_up(np.max(lengths), _MULTIPLE))
  apart = max(1, shortest * (_STRETCH - 1) // (_LENGTHS * _MULTIPLE))
  return list(range(shortest, shortest * _STRETCH + 1, apart * _MULTIPLE))


def round_up(count, multiple: int):
  """The next multiple, of a number or an array of them."""
  return -(-count // multiple) * multiple


def _rows_needed(sample: np.ndarray, length: int) -> tuple[np.ndarray, int]:
  """Rows that each batch needs, and the most examples seen in a row.

  `packing.first_fit` for all batches of the sample side by side.
  """
  batches, size = sample.shape
  # Two rows that follow one another hold more than one row's length.
  most = 2 * int(sample.sum(axis=1).max()) // length + 1
  room = np.full((batches, min(size, most)), length)
  count = np.zeros_like(room)
  every = np.arange(batches)
  for lengths in sample.T:
    row = (room >= lengths[:, None]).argmax(axis=1)
    room[every, row] -= lengths
    count[every, row] += 1
  return (count > 0).sum(axis=1), int(count.max())


def _choose_row_counts(
  needed: np.ndarray, length: int, *, shards: int, compiling: float
) -> tuple[float, tuple[int, ...]]:
  """At most three row counts of least cost, and their mean cost in tokens.

  All triples are tried: the smallest, of which further microbatches are made,
  and two (or one, the two being the same) of the counts that occur.

  Args:
    needed: rows of each batch.
    compiling: what a shape costs, in tokens per step.
  """
  values, times = np.unique(needed, return_counts=True)
  share = times / len(needed)
  best: tuple[float, tuple[int, ...]] = (np.inf, ())
  smalls = {*values.tolist(), *range(shards, shards * _SMALL + 1, shards)}
  for small in sorted(smalls):
    mains = np.array(sorted({small, *values[values >= small].tolist()}))
    costs = microbatch_cost(values, mains[:, None], small, length)
    for i, main in enumerate(mains):
      least = np.minimum(costs[i], costs[0])  # small itself is the first
      pairs = np.minimum(costs[i:], least) @ share
      shapes = 3 - (mains[i:] == main) - (main == small)
      totals = pairs + compiling * shapes
      j = int(totals.argmin())
      rows = tuple(sorted({int(small), int(main), int(mains[i + j])}))
      best = min(best, (float(totals[j]), rows))
  return best
