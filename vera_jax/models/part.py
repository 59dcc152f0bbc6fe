"""A piece of a transformer: what all share, and how layers are stacked."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from vera_jax.errors import UserError
from vera_jax.operations.attention import Mask, attend
from vera_jax.operations.dropout import dropout

REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMATS = ("none", *REMAT_POLICIES)
_LAYER = re.compile(r"layer(_\d+)?")


class Part(nn.Module):
  """A piece of a network: the settings that all share, and their layers.

  `deterministic` is an attribute, hence static under scan and remat.
  """

  config: Any
  dtype: DTypeLike
  param_dtype: DTypeLike
  deterministic: bool

  @property
  def settings(self) -> tuple[Any, DTypeLike, DTypeLike, bool]:
    return self.config, self.dtype, self.param_dtype, self.deterministic

  @nn.nowrap
  def dense(self, features: int, name: str, *, bias: bool = True) -> nn.Dense:
    return nn.Dense(
      features,
      use_bias=bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.normal(self.config.initializer_range),
      name=name,
    )

  @nn.nowrap
  def embed(self, rows: int, name: str) -> nn.Embed:
    return nn.Embed(
      rows,
      self.config.hidden_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=nn.initializers.normal(self.config.initializer_range),
      name=name,
    )

  @nn.nowrap
  def dropout(self, hidden: Array, rate: float) -> Array:
    if self.deterministic or rate == 0:
      return hidden
    return dropout(self.make_rng("dropout"), hidden, rate)

  @nn.nowrap
  def attention(
    self, read: Array, hidden: Array, mask: Mask | None, *, bias: bool = True
  ) -> Array:
    """Self-attention by the layers `query`, `key` and `value`, heads joined.

    Args:
      read: where attention is wanted; the queries.
      hidden: what is attended to; the keys and values.
      mask: which of them each query sees; None for all.
      bias: whether the three layers have one.
    """
    config, width = self.config, hidden.shape[-1]
    query, key, value = (
      self.dense(width, name, bias=bias)(x).reshape(
        *x.shape[:-1], config.num_attention_heads, -1
      )
      for name, x in (("query", read), ("key", hidden), ("value", hidden))
    )
    rate = config.attention_probs_dropout_prob
    return attend(
      query, key, value, mask, dropout=lambda x: self.dropout(x, rate)
    )


def with_remat(layer: Any, remat: str, *, scan: bool = False) -> Any:
  """A class of layers whose backward pass computes anew what it needs.

  Args:
    layer: the class.
    remat: "none": everything inside is kept; "full": nothing; "dots": what the
      dense layers give.
    scan: whether the layers are scanned.

  Raises:
    UserError: there is no such `remat`.
  """
  if remat not in REMATS:
    raise UserError(f"remat is {remat!r}; it is one of {', '.join(REMATS)}.")
  if remat == "none":
    return layer
  # A scan's body is compiled apart: XLA has nothing there to join again.
  return nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=not scan)


def is_layer(module: nn.Module) -> bool:
  """Whether it is one of a stack's, as `apply_layers` names them."""
  return isinstance(module, Part) and bool(_LAYER.fullmatch(module.name or ""))


def apply_layers(
  part: Any,
  layer: Any,
  call: Callable[..., tuple[Any, Any]],
  carry: Any,
  each: Sequence[Any],
  *shared: Any,
) -> tuple[Any, list[Any]]:
  """Applies layers that are alike, one after the other.

  With `part.scan` they are compiled once, and their leaves lie stacked below
  "layer", on an axis in front; else they are "layer_0", "layer_1" and so on.

  Args:
    part: the piece of the network that has the layers.
    layer: their class.
    call: (a layer, carry, its extra, *shared) -> (carry, an output).
    carry: what the first layer is given; each gives the next one's.
    each: what each layer alone is given, its extra, as many as there are
      layers.
    shared: what all layers are given.

  Returns:
    The last layer's carry, and the outputs of all.
  """
  if not part.scan or not each:
    outputs = []
    for index, extra in enumerate(each):
      one = layer(*part.settings, name=f"layer_{index}")
      carry, output = call(one, carry, extra, *shared)
      outputs.append(output)
    return carry, outputs
  stack = nn.scan(
    call,
    variable_axes={True: 0},  # every collection, an adapter's too
    split_rngs={True: True},
    in_axes=(0, *(nn.broadcast for _ in shared)),
    length=len(each),
  )
  stacked = jax.tree.map(
    lambda *extras: jnp.stack(list(map(jnp.asarray, extras))), *each
  )
  one = layer(*part.settings, name="layer")
  carry, outputs = stack(one, carry, stacked, *shared)
  return carry, [
    jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(len(each))
  ]
