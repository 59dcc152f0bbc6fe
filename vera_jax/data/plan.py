"""Chooses the shapes of packed batches from the lengths of a data set.

XLA compiles each shape anew, and every token of a shape costs as much as a
real one. The plan weighs the two.
"""

import numpy as np
from jaxtyping import Int64

from vera_jax.data.placement import Layout, place_all

_MULTIPLE = 8  # row lengths are multiples of it
_STRETCH = (1.0, 1.25, 1.5, 2.0)  # row lengths tried, in longest examples
_SAMPLE = 4096  # batches that a plan looks at
_SHAPES = 4  # row counts that serve all the batches of that sample
_SHAPE_COST = 0.01  # a further shape must save this share of the tokens
_ATTENTION = 1 / 2048  # a row of 2048 costs as much again for attention


def plan_layout(
  lengths: Int64[np.ndarray, " examples"],
  *,
  batch_size: int,
  shards: int = 1,
  shapes: int = _SHAPES,
  seed: int = 0,
) -> Layout:
  """Chooses row length and row counts for random batches of these lengths.

  A sample of batches is packed into rows of a few lengths. The cheapest plan
  wins, by tokens processed, with a surcharge for longer rows (attention) and
  for each further shape (compiling). One more row count, enough for whatever
  batch, is only compiled should it be needed.

  Args:
    lengths: tokens of every example, those of the other splits too when
      they are to be packed by the same layout.
    batch_size: examples in a batch.
    shards: every row count is a multiple of it: devices along "data".
    shapes: at most so many row counts for usual batches.
  """
  batch_size = min(batch_size, len(lengths))
  sample = _sample(lengths, batch_size, seed)
  plans = [
    _plan(sample, length, shards, shapes) for length in _row_lengths(lengths)
  ]
  _, layout = min(plans)
  enough = _round_up(batch_size, shards)
  rows = sorted({*layout.rows, enough})
  return layout._replace(rows=tuple(rows))


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
  longest = int(np.max(lengths))
  return sorted({_round_up(int(longest * s), _MULTIPLE) for s in _STRETCH})


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
  sample: np.ndarray, length: int, shards: int, shapes: int
) -> tuple[float, Layout]:
  """The cheapest plan with that row length, and its cost in tokens."""
  needed, slots = _first_fit_counts(sample, length)
  needed = -(-needed // shards) * shards
  plans = []
  for count in range(1, shapes + 1):
    rows = _row_counts(needed, count)
    processed = length * np.mean(_smallest(rows, needed))
    cost = processed * (1 + length * _ATTENTION) * (1 + count * _SHAPE_COST)
    plans.append((float(cost), Layout(rows, length, slots)))
  return min(plans)


def _first_fit_counts(
  sample: np.ndarray, length: int
) -> tuple[np.ndarray, int]:
  """Rows that each batch needs, and the most examples seen in a row.

  `first_fit` for all batches of the sample side by side.
  """
  batches, size = sample.shape
  room = np.full((batches, size), length)
  held = np.zeros((batches, size), np.int64)
  each = np.arange(batches)
  for lengths in sample.T:
    fits = room >= lengths[:, None]
    row = fits.argmax(axis=1)
    room[each, row] -= lengths
    held[each, row] += 1
  return (held > 0).sum(axis=1), int(held.max())


def _smallest(rows: tuple[int, ...], needed: np.ndarray) -> np.ndarray:
  """The row count that each batch gets."""
  return np.array(rows)[np.searchsorted(rows, needed)]


def _row_counts(needed: np.ndarray, count: int) -> tuple[int, ...]:
  """At most `count` row counts with the least sum over the batches.

  Dynamic programming over the counts that occur: `best[j]` is the least sum
  for the batches up to the j-th count, with that count among the chosen.
  """
  unique, times = np.unique(needed, return_counts=True)
  values: list[int] = unique.tolist()
  upto: list[int] = [0, *np.cumsum(times).tolist()]
  best: list[tuple[int, tuple[int, ...]]] = [
    (value * upto[j + 1], (value,)) for j, value in enumerate(values)
  ]
  for _ in range(count - 1):
    longer = []
    for j, value in enumerate(values):
      added = [
        (total + value * (upto[j + 1] - upto[i + 1]), (*rows, value))
        for i, (total, rows) in enumerate(best[:j])
      ]
      longer.append(min([best[j], *added]))
    best = longer
  return best[-1][1]
