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

import numpy as np
from jaxtyping import Int

from vera_jax.data.placement import Layout, Placement, first_fit, passes
from vera_jax.data.plan import plan_eval_layout, plan_layout
from vera_jax.data.tokens import Tokens

__all__ = [
  "Batch",
  "Layout",
  "fill",
  "pack",
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
  place = first_fit(tokens.lengths[indices], layout)
  shapes = passes(place.rows, layout)
  firsts = np.cumsum((0, *shapes[:-1])).tolist()
  return tuple(
    fill(tokens, indices, place, layout, first=first, rows=rows)
    for first, rows in zip(firsts, shapes, strict=True)
  )


def fill(
  tokens: Tokens,
  indices: Int[np.ndarray, " examples"],
  place: Placement,
  layout: Layout,
  *,
  first: int,
  rows: int,
) -> Batch:
  """The arrays of some rows of a placement, from row `first` on."""
  weight = 1 / len(indices)
  here, place = place.part(first, rows)
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
