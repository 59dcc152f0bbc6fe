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
from jax import Array
from jaxtyping import Bool, Float, Int

from vera_jax.adapters.labels import join
from vera_jax.models.decoder import Cache, logits
from vera_jax.train.step import Frozen, Tree


def _apply(
  module: nn.Module,
  frozen: Frozen,
  leaves: Tree,
  cache: Cache,
  ids: Int[Array, "1 tokens"],
  real: Bool[Array, "1 tokens"],
) -> tuple[Array, Cache]:
  """Logits [1, vocab] behind a row's last real token, and its cache."""
  variables = {"params": join(leaves, frozen.params)}
  if frozen.projections:
    variables["projections"] = frozen.projections
  outputs: Any = module.apply(
    variables,
    ids,
    segment_ids=real.astype(jnp.int32),
    read_positions=jnp.maximum(jnp.sum(real, axis=1, keepdims=True) - 1, 0),
    cache=cache,
  )
  words, cache = outputs
  return logits(words)[:, 0], cache


@partial(jax.jit, static_argnames="module", donate_argnames="cache")
def decode_rows(
  module: nn.Module,
  frozen: Frozen,
  leaves: Tree,
  cache: Cache,
  ids: Int[Array, " rows"],
  running: Bool[Array, " rows"],
) -> tuple[Float[Array, "rows vocab"], Cache]:
  """Reads a word of each running row: the logits of the next ones.

  Args:
    module: a decoder with an adapter on it, by the factored plan.
    frozen: what all rows share.
    leaves: the adapters', [rows, ...].
    cache: of all rows; donated.
    ids: each row's last word.
    running: the rows that have one; the others are computed and not written.
  """

  def one_row(leaves: Tree, cache: Cache, token: Array, real: Array):
    cache = jax.tree.map(lambda x: x[None], cache)
    scores, cache = _apply(
      module, frozen, leaves, cache, token[None, None], real[None, None]
    )
    return scores[0], jax.tree.map(lambda x: x[0], cache)

  return jax.vmap(one_row)(leaves, cache, ids, running)


@partial(jax.jit, static_argnames="module", donate_argnames="cache")
def read_piece(
  module: nn.Module,
  frozen: Frozen,
  leaves: Tree,
  cache: Cache,
  row: Int[Array, ""],
  start: Int[Array, ""],
  piece: Int[Array, " piece"],
  count: Int[Array, ""],
) -> tuple[Float[Array, "1 vocab"], Cache]:
  """Reads a piece of one row's prompt: the logits of the word behind it.

  Args:
    module, frozen, leaves, cache: as for `decode_rows`.
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
  own = Cache(
    own.keys,
    tuple(jnp.where(past, x, 0) for x in own.values),
    start[None].astype(jnp.int32),
  )
  mine = jax.tree.map(lambda x: x[0], of_row(leaves))
  real = (jnp.arange(piece.shape[0]) < count)[None]
  scores, own = _apply(module, frozen, mine, own, piece[None], real)
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
