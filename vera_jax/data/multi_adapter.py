"""Batches whose examples name different adapters: a row belongs to one.

Texts of one adapter share rows as in any packed batch; texts of two never do,
so that a row says by one number which adapter it runs with.
"""

import numpy as np
from jaxtyping import Int

from vera_jax.data.packing import Batch, Layout, fill
from vera_jax.data.placement import Placement, place_all
from vera_jax.data.tokens import Tokens


def place_mixed(
  lengths: Int[np.ndarray, " examples"],
  adapters: Int[np.ndarray, " examples"],
  layout: Layout,
) -> Placement:
  """`place_all` for the examples of each adapter, one adapter after another."""
  order = np.argsort(adapters, kind="stable")
  place = np.zeros((3, len(lengths)), np.int64)
  rows = 0
  edges = np.flatnonzero(np.diff(adapters[order])) + 1
  for mine in np.split(order, edges):
    part = place_all(lengths[mine], layout)
    place[:, mine] = part.row + rows, part.start, part.slot
    rows += part.rows
  return Placement(*place)


def name_rows(batch: Batch, adapters: Int[np.ndarray, " examples"]) -> Batch:
  """The batch with int32 [rows] `adapter`; -1 in a row without examples.

  `adapters` has an entry for each example of the tokens that were packed.
  """
  first = batch["example"][:, 0]  # a row fills its slots from the left
  named = np.where(first >= 0, adapters[first], -1).astype(np.int32)
  return {**batch, "adapter": named}


def pack_mixed(
  tokens: Tokens,
  indices: Int[np.ndarray, " batch"],
  adapters: Int[np.ndarray, " examples"],
  layout: Layout,
) -> Batch:
  """`packing.pack` for a training batch of several adapters.

  Args:
    tokens: a split.
    indices: the examples of the batch.
    adapters: the slot of every example of the split, as `AdapterBank.slots`
      gives it.
    layout: its most rows must be enough; as many as examples always are.
  """
  place = place_mixed(tokens.lengths[indices], adapters[indices], layout)
  allowed = [rows for rows in layout.rows if rows >= place.rows]
  if not allowed:
    raise ValueError(f"{place.rows} rows are needed, {layout} has fewer")
  batch = fill(tokens, indices, place, layout, first=0, rows=allowed[0])
  return name_rows(batch, adapters)
