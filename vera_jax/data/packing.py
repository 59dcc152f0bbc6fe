"""Packs the examples of a batch into rows: little padding, few shapes.

Short texts share a row. Segment ids keep them apart in attention, positions
start again with each, so a packed batch is the very batch that padding would
give. XLA compiles every array shape anew, hence a `Layout`: one row length and
at most three row counts, chosen from the data before training. A batch that
needs more rows than usual takes a further pass, whose gradient is added.

  row     [CLS] a b [SEP] [CLS] c [SEP]  -   -
  segment   1   1 1   1     2   2   2    0   0
  position  0   1 2   3     0   1   2    0   0
"""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from jaxtyping import Int

from vera_jax.data.placement import Layout, Placement, first_fit, passes
from vera_jax.data.plan import plan_eval_layout, plan_layout
from vera_jax.data.portion import WHOLE, Portion
from vera_jax.data.tokens import Tokens

__all__ = [
  "Batch",
  "Layout",
  "fill",
  "pack",
  "pack_alike",
  "plan_eval_layout",
  "plan_layout",
]

Batch = dict[str, np.ndarray]


def pack(
  tokens: Tokens, indices: Int[np.ndarray, " examples"], layout: Layout
) -> tuple[Batch, ...]:
  """Packs the examples of a step: one pass as a rule, more for a long batch.

  The passes' losses and gradients add up to the batch's: see `weights`.

  Returns:
    for each pass, with a row count of the layout,
    int32 [rows, length] `input_ids`, `token_type_ids`, `positions` (from 0 in
    each example) and `segment_ids` (from 1 in each row, 0 for padding);
    [rows, slots] `cls_positions` (the column of an example's first token),
    `example` (its index into `tokens`; -1 for an empty slot), `labels`
    (int32, or float32 for regression; 0 in an empty slot or without labels)
    and float32 `weights` (one over the step's examples; 0 in an empty slot).
  """
  (passes,) = pack_alike(tokens, [indices], layout)
  return passes


def pack_alike(
  tokens: Tokens,
  batches: Sequence[Int[np.ndarray, " _"]],
  layout: Layout,
  portion: Portion = WHOLE,
) -> list[tuple[Batch, ...]]:
  """`pack` for several batches, all in the shapes that the largest needs.

  Each example lies in the pass, row and column that it has alone. Of each pass
  only the portion's rows are made.
  """
  places = [first_fit(tokens.lengths[indices], layout) for indices in batches]
  own = [passes(place.rows, layout) for place in places]
  shapes = [max(counts) for counts in zip_longest(*own, fillvalue=0)]
  return [
    _fill_passes(tokens, indices, place, layout, counts, shapes, portion)
    for indices, place, counts in zip(batches, places, own, strict=True)
  ]


def _fill_passes(
  tokens: Tokens,
  indices: Int[np.ndarray, " examples"],
  place: Placement,
  layout: Layout,
  counts: Sequence[int],
  shapes: Sequence[int],
  portion: Portion,
) -> tuple[Batch, ...]:
  """`counts` rows of the placement a pass, in arrays of `shapes` rows."""
  ends = np.cumsum(counts).tolist()
  return tuple(
    fill(
      tokens,
      indices,
      place,
      layout,
      first=end - held,
      held=held,
      rows=rows,
      portion=portion,
    )
    for end, held, rows in zip_longest(ends, counts, shapes, fillvalue=0)
  )


def fill(
  tokens: Tokens,
  indices: Int[np.ndarray, " examples"],
  place: Placement,
  layout: Layout,
  *,
  first: int,
  rows: int,
  held: int | None = None,
  portion: Portion = WHOLE,
) -> Batch:
  """The arrays of some rows of a placement, from row `first` on.

  Of `rows` rows the first `held` are the placement's, or all; the others stay
  empty. The portion's rows of them are made.
  """
  weight = 1 / len(indices)
  low, high = portion.bounds(rows)
  held = min(rows if held is None else held, high) - low
  here, place = place.part(first + low, max(held, 0))
  rows = high - low
  indices = indices[here]
  lengths = tokens.lengths[indices]
  before = np.cumsum(lengths) - lengths
  within = np.arange(lengths.sum()) - np.repeat(before, lengths)
  source = np.repeat(tokens.offsets[indices], lengths) + within
  target = np.repeat(place.row * layout.length + place.start, lengths) + within

  def wide(values: np.ndarray, empty: int = 0) -> np.ndarray:
    flat = np.full(rows * layout.length, empty, np.int32)
    flat[target] = values
    return flat.reshape(rows, layout.length)

  def slotted(values: np.ndarray, empty: int = 0) -> np.ndarray:
    grid = np.full((rows, layout.slots), empty, values.dtype)
    grid[place.row, place.slot] = values
    return grid

  labels = tokens.labels
  if labels is None:
    labels = np.zeros(len(tokens), np.int32)
  return {
    "input_ids": wide(tokens.ids[source], tokens.pad_id),
    "token_type_ids": wide(tokens.token_types[source]),
    "positions": wide(within),
    "segment_ids": wide(np.repeat(place.slot + 1, lengths)),
    "cls_positions": slotted(place.start.astype(np.int32)),
    "example": slotted(np.asarray(indices, np.int32), -1),
    "labels": slotted(labels[indices]),
    "weights": slotted(np.full(len(indices), weight, np.float32)),
  }
