"""Chooses the shapes of packed batches from the lengths of a data set.

XLA compiles each shape anew, and every token of a shape costs as much as a
real one. The plan weighs the two over the run's length: a short run has one
shape, a long one three, of which the smallest serves as the further pass that
an unusually long batch needs (`placement.passes`). So any batch fits.
"""

import numpy as np
from jaxtyping import Int64

from vera_jax.data.placement import Layout, pass_cost, place_all

_MULTIPLE = 8  # row lengths are multiples of it
_STRETCH = 2  # row lengths tried: up to so many longest examples
_LENGTHS = 10  # how many of them, at least
_SAMPLE = 512  # batches that a plan looks at
_SMALL = 4  # rows of a further pass: up to so many, or as many as a batch
_ATTENTION = 1 / 2048  # a row of 2048 costs as much again for attention
_COMPILE = 6000  # tokens that one CPU core trains on while a shape compiles


def plan_layout(
  lengths: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  epochs: int = 1,
  shards: int = 1,
  seed: int = 0,
) -> Layout:
  """Chooses row length and row counts for random batches of these lengths.

  A sample of batches is packed into rows of several lengths. The cheapest plan
  wins, by the tokens that the whole run processes, with a surcharge for longer
  rows (attention), for each further pass and for each shape (compiling).

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
  steps = epochs * len(lengths) // batch_size
  sample = _sample(lengths, batch_size, seed)
  plans = [
    _plan(sample, length, shards, steps) for length in _row_lengths(lengths)
  ]
  return min(plans)[1]


def plan_eval_layout(
  lengths: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  shards: int = 1,
) -> Layout:
  """One shape for a whole split: about `batch_size` examples a batch.

  The row count is such that the last batch is as full as the others.
  """
  length = _row_lengths(lengths)[0]
  # twice the usual number, so that the shortest texts don't crowd one row
  slots = min(len(lengths), int(np.ceil(2 * length / np.mean(lengths))))
  layout = Layout((), length, slots)
  needed = place_all(lengths, layout).rows
  batches = max(1, round(len(lengths) / batch_size))
  return layout._replace(rows=(_round_up(-(-needed // batches), shards),))


def _row_lengths(lengths: np.ndarray) -> list[int]:
  shortest = _round_up(int(np.max(lengths)), _MULTIPLE)
  apart = max(1, shortest * (_STRETCH - 1) // (_LENGTHS * _MULTIPLE))
  longest = shortest * _STRETCH
  return list(range(shortest, longest + 1, apart * _MULTIPLE))


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def _sample(lengths: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
  """Lengths in shuffled batches [batches, batch_size], longest first."""
  rng = np.random.default_rng(seed)
  whole = len(lengths) // batch_size
  epochs = -(-_SAMPLE // whole)
  batches = [
    rng.permutation(lengths)[: whole * batch_size].reshape(whole, batch_size)
    for _ in range(epochs)
  ]
  return -np.sort(-np.concatenate(batches)[:_SAMPLE], axis=1)


def _plan(
  sample: np.ndarray, length: int, shards: int, steps: int
) -> tuple[float, Layout]:
  """The cheapest plan with that row length, and its cost in tokens."""
  needed, slots = _first_fit_counts(sample, length)
  needed = -(-needed // shards) * shards
  # in tokens of this row length, which cost more than others
  compiling = _COMPILE / (1 + length * _ATTENTION) / max(1, steps)
  cost, rows = _row_counts(needed, length, shards, compiling)
  cost *= 1 + length * _ATTENTION
  return cost, Layout(rows, length, slots)


def _first_fit_counts(
  sample: np.ndarray, length: int
) -> tuple[np.ndarray, int]:
  """Rows that each batch needs, and the most examples seen in a row.

  `first_fit` for all batches of the sample side by side.
  """
  batches, size = sample.shape
  # two rows that follow one another hold more than one row's length
  most = 2 * int(sample.sum(axis=1).max()) // length + 1
  room = np.full((batches, min(size, most)), length)
  held = np.zeros_like(room)
  each = np.arange(batches)
  for lengths in sample.T:
    fits = room >= lengths[:, None]
    row = fits.argmax(axis=1)
    room[each, row] -= lengths
    held[each, row] += 1
  return (held > 0).sum(axis=1), int(held.max())


def _row_counts(
  needed: np.ndarray, length: int, shards: int, compiling: float
) -> tuple[float, tuple[int, ...]]:
  """At most three row counts of least cost, and their mean cost in tokens.

  All triples are tried: the smallest, of which further passes are made, and
  two (or one, the two being the same) of the counts that occur.

  Args:
    needed: rows of each batch.
    compiling: tokens a step that a shape costs.
  """
  values, times = np.unique(needed, return_counts=True)
  share = times / len(needed)
  best: tuple[float, tuple[int, ...]] = (np.inf, ())
  smalls = {*values.tolist(), *range(shards, shards * _SMALL + 1, shards)}
  for small in sorted(smalls):
    mains = np.array(sorted({small, *values[values >= small].tolist()}))
    costs = pass_cost(values, mains[:, None], small, length)
    for i, main in enumerate(mains):
      least = np.minimum(costs[i], costs[0])  # small itself is the first
      pairs = np.minimum(costs[i:], least) @ share
      shapes = 3 - (mains[i:] == main) - (main == small)
      totals = pairs + compiling * shapes
      j = int(totals.argmin())
      rows = tuple(sorted({int(small), int(main), int(mains[i + j])}))
      best = min(best, (float(totals[j]), rows))
  return best
