"""Layer kinds: how a call of a linen layer is seen as `x @ kernel + bias`.

A new kind is one function and one line in `KINDS`. A kernel may be stored in
fewer bits (`models/quantised.py`): then it is dequantised where it is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.models.quantised import dequantise, is_quantised


class Product(NamedTuple):
  """A layer's call, seen as one product.

  Attributes:
    x: (..., i), the contracted axes moved behind and made one.
    outputs: o.
    features: the axes that the layer's output has in place of o.
    multiply: (x, kernel (i, o)) -> (..., o), with the layer's own precision
      and dot_general.
    plain: whether `multiply` is `x @ kernel`.
  """

  x: Float[Array, "*t i"]
  outputs: int
  features: tuple[int, ...]
  multiply: Callable[[Array, Array], Array]
  plain: bool


def _dense(layer: Any, x: Array) -> Product | None:
  """`nn.Dense` and `nn.DenseGeneral`, with any axes and features."""
  if getattr(layer, "batch_dims", ()):
    return None  # one kernel per row: no single delta fits it
  axis, features = getattr(layer, "axis", -1), layer.features
  axes = axis if isinstance(axis, Sequence) else (axis,)
  axes = tuple(sorted(a % x.ndim for a in axes))
  features = tuple(features) if isinstance(features, Sequence) else (features,)
  x = jnp.moveaxis(x, axes, range(-len(axes), 0))
  x = x.reshape(*x.shape[: -len(axes)], -1)

  def multiply(x: Array, kernel: Array) -> Array:
    if plain:
      return x @ kernel
    dot = layer.dot_general or jax.lax.dot_general
    if layer.dot_general_cls is not None:
      dot = layer.dot_general_cls()
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return dot(x, kernel, contract, precision=layer.precision)

  own = layer.precision, layer.dot_general, layer.dot_general_cls
  plain = own == (None, None, None)
  return Product(x, math.prod(features), features, multiply, plain)


KINDS: dict[type[nn.Module], Callable[[Any, Array], Product | None]] = {
  nn.Dense: _dense,
  nn.DenseGeneral: _dense,
}


def product_of(
  context: nn.module.InterceptorContext, args: Any, kwargs: Any
) -> Product | None:
  """The product that an intercepted call makes; None if it makes none."""
  if context.method_name != "__call__":
    return None
  for kind, see in KINDS.items():
    if isinstance(context.module, kind):
      return see(context.module, kwargs.get("inputs", *args))
  return None


def flat_kernel(
  leaves: Mapping[str, Any], stack: tuple[int, ...], outputs: int
) -> Float[Array, "*stack i o"]:
  """A layer's kernel as (*stack, i, o), dequantised where it is quantised."""
  kernel = leaves["kernel"]
  if is_quantised(kernel):
    return dequantise(kernel)
  return kernel.reshape(*stack, -1, outputs)


def flat_bias(
  leaves: Mapping[str, Any], stack: tuple[int, ...]
) -> Float[Array, "*stack o"] | None:
  """A layer's bias as (*stack, o); None where it has none."""
  return leaves["bias"].reshape(*stack, -1) if "bias" in leaves else None
