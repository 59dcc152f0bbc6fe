"""What `rows.py` compiles: reading a piece of one row's prompt, or a word of
every row.

Each row has an adapter's vectors of its own, put there when it begins, so that
a step gathers nothing: it costs the same however many adapters the bank holds.
Base, A and B have no axis of rows and stay single products over all of them, as
in `train.multi_adapter`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from vera_jax.adapters.labels import join
from vera_jax.generate.decode import prefill
from vera_jax.models.decoder import Cache
from vera_jax.train.step import Frozen, Tree


@struct.dataclass
class RowModel:
  """A decoder of which every row has an adapter of its own.

  Attributes:
    module: with an adapter on it, by the factored plan.
    frozen: what all rows share.
    leaves: the adapters', [rows, ...].
  """

  module: nn.Module = struct.field(pytree_node=False)
  frozen: Frozen
  leaves: Tree

  def read(
    self,
    leaves: Tree,
    cache: Cache,
    ids: Int[Array, " tokens"],
    count: Int[Array, ""],
  ) -> tuple[Float[Array, "1 vocab"], Cache]:
    """Reads the first tokens, so many, by one row's leaves and cache."""
    variables = {"params": join(leaves, self.frozen.params)}
    if self.frozen.projections:
      variables["projections"] = self.frozen.projections
    return prefill(self.module, variables, cache, ids[None], count[None])


@partial(jax.jit, donate_argnames="cache")
def decode_rows(
  model: RowModel,
  cache: Cache,
  ids: Int[Array, " rows"],
  running: Bool[Array, " rows"],
) -> tuple[Float[Array, "rows vocab"], Cache]:
  """Reads a word of each running row: the logits of the next ones.

  Args:
    model: with the adapters of all rows.
    cache: of all rows; donated.
    ids: each row's last word.
    running: the rows that have one; the others are computed and not written.
  """

  def one_row(leaves: Tree, cache: Cache, token: Array, count: Array):
    cache = jax.tree.map(lambda x: x[None], cache)
    scores, cache = model.read(leaves, cache, token[None], count)
    return scores[0], jax.tree.map(lambda x: x[0], cache)

  counts = running.astype(jnp.int32)
  return jax.vmap(one_row)(model.leaves, cache, ids, counts)


@partial(jax.jit, donate_argnames="cache")
def read_piece(
  model: RowModel,
  cache: Cache,
  row: Int[Array, ""],
  start: Int[Array, ""],
  piece: Int[Array, " piece"],
  count: Int[Array, ""],
) -> tuple[Float[Array, "1 vocab"], Cache]:
  """Reads a piece of one row's prompt: the logits of the word behind it.

  Args:
    model, cache: as for `decode_rows`.
    row: whose prompt it is.
    start: how many of its tokens were read before. What else the row's part of
      the cache holds is another answer's, and is forgotten.
    piece: tokens, padded on the right.
    count: how many of them are real.
  """

  def of_row(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), tree
    )

  own = of_row(cache)
  # a masked slot counts 0 times, which of infinity would be no number
  past = (jnp.arange(cache.slots) < start)[None, None, :, None]
  values = tuple(jnp.where(past, x, 0) for x in own.values)
  own = Cache(own.keys, values, start[None].astype(jnp.int32))
  mine = jax.tree.map(lambda x: x[0], of_row(model.leaves))
  scores, own = model.read(mine, own, piece, count)
  cache = jax.tree.map(
    lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, row, axis=0),
    cache,
    own,
  )
  return scores, cache


@partial(jax.jit, static_argnames="slots")
def resized(cache: Cache, *, slots: int) -> Cache:
  """The cache with so many slots, the first ones kept."""

  def change(x: Array, axis: int) -> Array:
    if slots <= x.shape[axis]:
      return jax.lax.slice_in_dim(x, 0, slots, axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, slots - x.shape[axis]
    return jnp.pad(x, widths)

  return Cache(
    tuple(change(x, 3) for x in cache.keys),
    tuple(change(x, 2) for x in cache.values),
    cache.positions,
  )
