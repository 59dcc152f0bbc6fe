"""What the encoders' attention has in common: masks, products, defaults.

Several examples may share one row: segment ids number them from 1 (0 is
padding), attention stays inside a segment, and positions restart in each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from vera_jax.operations.gelu import gelu

Ids = Int[Array, "rows length"]
Places = Int[Array, "rows slots"]
Mask = Bool[Array, "rows 1 reads length"]

# The arrays of a packed batch that encoders take, by the modules' own names.
INPUTS = (
  "input_ids",
  "token_type_ids",
  "positions",
  "segment_ids",
  "cls_positions",
)
# Of its input alone the backward pass computes what it needs.
_tanh_gelu = jax.checkpoint(partial(nn.gelu, approximate=True))
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": gelu,
  "gelu_new": _tanh_gelu,
  "gelu_pytorch_tanh": _tanh_gelu,
  "relu": nn.relu,
  "silu": nn.silu,
  "swish": nn.silu,
}


def input_shapes(
  rows: int, length: int, slots: int, *, names: tuple[str, ...] = INPUTS
) -> dict[str, Any]:
  """These arrays of a packed batch, as shapes."""
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  places = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
  return {n: places if n == "cls_positions" else tokens for n in names}


def fill_inputs(
  input_ids: Ids,
  positions: Ids | None,
  segment_ids: Ids | None,
  cls_positions: Places | None,
  *,
  pad: int,
) -> tuple[Ids, Ids, Places]:
  """Positions, segments and read columns, where those that are not given are
  those of one example per row, padded with `pad` and read in column 0."""
  if positions is None:
    places = jnp.arange(input_ids.shape[1], dtype=input_ids.dtype)
    positions = jnp.broadcast_to(places, input_ids.shape)
  if segment_ids is None:
    segment_ids = (input_ids != pad).astype(jnp.int32)
  if cls_positions is None:
    cls_positions = jnp.zeros_like(input_ids[:, :1])
  return positions, segment_ids, cls_positions


def rotate(
  x: Float[Array, "rows length heads k"],
  cos: Float[Array, "rows length 1 _"],
  sin: Float[Array, "rows length 1 _"],
) -> Float[Array, "rows length heads k"]:
  """Rotary positions (arXiv 2104.09864): the pairs (j, j + half) turned."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def same_segment(
  queries: Int[Array, "rows queries"], keys: Int[Array, "rows keys"]
) -> Bool[Array, "rows 1 queries keys"]:
  """Where a query may see a key: within its segment, by their numbers."""
  return queries[:, None, :, None] == keys[:, None, None, :]


def attend(
  query: Float[Array, "rows reads heads k"],
  key: Float[Array, "rows length heads k"],
  value: Float[Array, "rows length heads k"],
  mask: Mask | None,
  *,
  dropout: Callable[[Array], Array],
) -> Float[Array, "rows reads hidden"]:
  """softmax(q k / sqrt(k's width)) v with its heads joined.

  The softmax is computed in float32; `dropout` is put on its result.
  """
  weights = nn.dot_product_attention_weights(
    query, key, mask=mask, dtype=query.dtype, force_fp32_for_softmax=True
  )
  context = jnp.einsum("...hqk,...khd->...qhd", dropout(weights), value)
  return context.reshape(*query.shape[:2], -1)
