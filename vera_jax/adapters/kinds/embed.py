"""`nn.Embed`: one-hot rows times the table, made by looking rows up.

`attend`, the tied output layer, has the adapted table too: a merged network
could not keep them apart. Its table is made as a whole.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.intercept import SPECIAL, Interception, Special
from vera_jax.adapters.interface import Matrix, Site, View
from vera_jax.adapters.layer_calls import LayerCall, Params, bound_call
from vera_jax.adapters.layers import KINDS, Kind, site_of
from vera_jax.adapters.structured import as_array
from vera_jax.operations.coded_table import look_up
from vera_jax.operations.quantised import is_quantised


def _see(
  layer: Any, params: Params, *args: Any, **kwargs: Any
) -> tuple[View, int]:
  view = View(type(layer).__name__, "embedding", looked_up=True, forms=True)
  return view._replace(plans=("factored", "folded")), layer.features


def _call(layer: Any, params: Params, inputs: Array) -> LayerCall | str:
  if layer.num_embeddings == 1:
    return (
      "with a single row flax returns that row without a look-up, so there is"
      " nothing to adapt"
    )
  (like,) = layer.promote_dtype(
    jnp.zeros((), params["embedding"].dtype), dtype=layer.dtype, inexact=False
  )

  def take(ids: Array, table: Matrix) -> Array:
    return jnp.take(as_array(table, like.dtype), ids, axis=0)

  def take_coded(ids: Array, table: Matrix) -> Array:
    del table  # it has no adapter (`Blueprint.kernels`), and isn't made
    return look_up(params["embedding"], ids).astype(like.dtype)

  site = site_of(
    params,
    *_see(layer, params),
    dtype=like.dtype,
    bias=None,
    rows=inputs.size,
    multiply=take_coded if is_quantised(params["embedding"]) else take,
    project=take,
  )
  return LayerCall(site, inputs)


def table_site(kind: str, table: Array) -> Site:
  """A table that a tied output layer reads as a whole."""
  view = View(kind, "embedding", plans=("folded",))
  params, outputs = {"embedding": table}, table.shape[1]
  return site_of(params, view, outputs, dtype=table.dtype, bias=None, rows=0)


def _attend(
  interception: Interception, next_fun: Any, args: Any, kwargs: Any, layer: Any
) -> Any:
  """The tied output layer, by flax's own code on the adapted table."""
  if not interception.is_adapted(layer.path):
    return next_fun(*args, **kwargs)
  table = interception.params_of(layer)["embedding"]
  site = table_site(type(layer).__name__, table)._replace(path=layer.path)
  pieces = interception.pieces_of(layer, site)
  adapted, _ = interception.whole_weights(list(pieces))
  return bound_call(
    layer,
    {"embedding": adapted.astype(table.dtype)},
    lambda embed: embed.attend(*args, **kwargs),
  )


def _set_up(
  interception: Interception, next_fun: Any, args: Any, kwargs: Any, layer: Any
) -> Any:
  """flax would refuse a table in codes for its shape; `_call` reads it."""
  del interception
  if not is_quantised(layer.get_variable("params", "embedding")):
    next_fun(*args, **kwargs)


KINDS[nn.Embed] = Kind(_see, _call)
SPECIAL.append(Special(nn.Embed, "attend", _attend))
SPECIAL.append(Special(nn.Embed, "setup", _set_up))
