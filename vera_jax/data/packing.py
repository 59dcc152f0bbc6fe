"""Packs the examples of a batch into rows: little padding, few shapes.

Short texts share a row. Segment ids keep them apart in attention, positions
start again with each, so a packed batch is the very batch that padding would
give. XLA compiles every array shape anew, hence a `Layout`: one row length and
a handful of row counts, chosen from the data before training.

  row     [CLS] a b [SEP] [CLS] c [SEP]  -   -
  segment   1   1 1   1     2   2   2    0   0
  position  0   1 2   3     0   1   2    0   0
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vera_jax.data.placement import Layout, Placement, first_fit
from vera_jax.data.plan import plan_eval_layout, plan_layout
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
) -> Batch:
  """Packs some examples into the smallest allowed number of rows.

  Returns:
    int32 [rows, length] `input_ids`, `token_type_ids`, `positions` (from 0 in
    each example) and `segment_ids` (from 1 in each row, 0 for padding);
    [rows, slots] `cls_positions` (the column of an example's first token),
    `example` (its index into `tokens`; -1 for an empty slot) and `labels`
    (int32, or float32 for regression; 0 in an empty slot or without labels).
  """
  (batch,) = pack_alike(tokens, [indices], layout)
  return batch


def pack_alike(
  tokens: Tokens, batches: Sequence[Int[np.ndarray, " _"]], layout: Layout
) -> list[Batch]:
  """`pack` for several batches, all in the rows that the largest needs."""
  places = [first_fit(tokens.lengths[indices], layout) for indices in batches]
  needed = max(place.rows for place in places)
  allowed = [rows for rows in layout.rows if rows >= needed]
  if not allowed:
    raise ValueError(f"{needed} rows are needed, {layout} has fewer")
  one = layout._replace(rows=(allowed[0],))
  return [
    fill(tokens, indices, place, one)
    for indices, place in zip(batches, places, strict=True)
  ]


def fill(
  tokens: Tokens,
  indices: Int[np.ndarray, " examples"],
  place: Placement,
  layout: Layout,
) -> Batch:
  """The arrays of a placement; `layout` has one row count."""
  (rows,) = layout.rows
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
  }
