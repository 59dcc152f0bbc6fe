"""How a call of a linen layer is seen as `x @ kernel + bias`.

Here are flax's dense layers, whose kernels are matrices already. `kinds/` has
the others: each registers how its kernel is seen and how its product is made.
docs/architectures.md has the table in words. A kernel may be stored in fewer
bits (`operations/quantised.py`): then it is dequantised where it is used.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.adapters.interface import MATRIX, Path, Site, View
from vera_jax.adapters.layer_calls import LayerCall, Params
from vera_jax.operations.quantised import dequantise, is_quantised

BATCH_DIMS = (
  "it has a kernel for each row (batch_dims), which no one delta fits"
)
# Fields of flax's layers that hold a function which computes something.
HOOKS = (
  "promote_dtype",
  "dot_general",
  "dot_general_cls",
  "conv_general_dilated",
  "conv_general_dilated_cls",
)


class Kind(NamedTuple):
  """What is known of a class of layers.

  Attributes:
    seen: (layer, params, *args, **kwargs) -> (view of its kernel, outputs), the
      reason why it can't be adapted, or None for a module that is no layer.
    call: the same -> what the call of it is; or a reason, or None.
  """

  seen: Callable[..., tuple[View, int] | str | None]
  call: Callable[..., LayerCall | str | None]


def _see_dense(
  layer: Any, params: Params, *args: Any, **kwargs: Any
) -> tuple[View, int] | str:
  if getattr(layer, "batch_dims", ()):
    return BATCH_DIMS
  features = layer.features
  features = features if isinstance(features, Sequence) else (features,)
  return View(type(layer).__name__), math.prod(features)


def _call_dense(layer: Any, params: Params, inputs: Array) -> LayerCall | str:
  """`nn.Dense` and `nn.DenseGeneral`, with any axes and features."""
  seen = _see_dense(layer, params)
  if isinstance(seen, str):
    return seen
  axis, features = getattr(layer, "axis", -1), layer.features
  axes = axis if isinstance(axis, Sequence) else (axis,)
  axes = tuple(sorted(a % inputs.ndim for a in axes))
  features = tuple(features) if isinstance(features, Sequence) else (features,)
  x = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
  x = x.reshape(*x.shape[: -len(axes)], -1)
  x, bias = promoted(layer, x, params, "kernel")
  site = site_of(
    params,
    *seen,
    dtype=x.dtype,
    bias=bias,
    rows=math.prod(x.shape[:-1]),
    multiply=partial(jnp.matmul, precision=layer.precision),
  )
  return LayerCall(
    site,
    x,
    finish=lambda y: y.reshape(*y.shape[:-1], *features),
    plain=layer.precision is None,
  )


# By the nearest of a layer's base classes that is here; `nn.Module` is for
# those that are no class of flax's.
KINDS: dict[type[nn.Module], Kind] = {
  nn.Dense: Kind(_see_dense, _call_dense),
  nn.DenseGeneral: Kind(_see_dense, _call_dense),
}
LINEAR = ("Dense", "DenseGeneral")
OwnCode = Callable[..., LayerCall | str]
# What a layer's call is by the layer's own code: one function, which
# `kinds/derived.py` adds.
OWN_CODE: list[OwnCode] = []


def see_call(
  layer: nn.Module,
  params: Params,
  args: Any,
  kwargs: Any,
  *,
  intercepted: bool = False,
) -> LayerCall | str | None:
  """What a call of `layer.__call__` is, by `KINDS`.

  A layer that is one of flax's by its class, but may compute something else,
  goes by its own code: all that is known of it is its kernel.

  Args:
    layer: bound.
    params: its own parameters, without an adapter's.
    args, kwargs: of the call.
    intercepted: whether the model has put code of its own around the call, by
      `nn.intercept_methods`.

  Returns:
    The call, or the reason why the layer can't be adapted; None for a module
    that is no layer, or is bound to parameters of another module.
  """
  kind = next((x for x in type(layer).__mro__ if x in KINDS), None)
  if kind is None or not params:
    return None
  if not intercepted and is_flaxs(layer, kind):
    return KINDS[kind].call(layer, params, *args, **kwargs)
  seen = KINDS[kind].seen(layer, params, *args, **kwargs)
  if seen is None or isinstance(seen, str):
    return seen
  if not OWN_CODE:
    return "its class, or the model, has code of its own for its call"
  return OWN_CODE[0](layer, params, *seen, args, kwargs)


class _SetsFields(nn.Module):
  """It defines nothing: what it has, flax and dataclasses put there."""

  field: int = 0


def is_flaxs(layer: nn.Module, kind: type[nn.Module]) -> bool:
  """Whether a layer's code is that of flax's class.

  A class derived from it may change a parameter on its way into an inherited
  call, as a standardised convolution does by its `param`, and a field may hold
  a function that does anything. So nothing may be defined or set but values.
  """
  if kind is nn.Module:  # whose call decides for itself
    return True
  derived = type(layer).__mro__[: type(layer).__mro__.index(kind)]
  fields = {field.name for field in dataclasses.fields(layer)}
  defined = {name for one in derived for name in vars(one)} - fields
  return defined <= vars(_SetsFields).keys() and all(
    getattr(layer, name) is getattr(kind, name)
    for name in HOOKS
    if hasattr(kind, name)
  )


def place_of(layer: nn.Module) -> Path:
  """Where below its scope the leaves of a layer lie: its name, where it is no
  layer of flax's and shares another module's scope, which has the kernels of
  several; () else."""
  known = any(x in KINDS for x in type(layer).__mro__ if x is not nn.Module)
  if known or layer.name is None or layer.path[-1:] == (layer.name,):
    return ()
  return (layer.name,)


def site_of(
  params: Params,
  view: View,
  outputs: int,
  *,
  dtype: DTypeLike,
  bias: Array | None,
  rows: int,
  multiply: Callable[[Array, Array], Array] = jnp.matmul,
  project: Callable[[Array, Any], Array] = operator.matmul,
) -> Site:
  """A layer's product as a site, with its kernel and how it multiplies."""

  def kernel() -> Float[Array, "i o"]:
    return flat_kernel(params, (), outputs, view).astype(dtype)

  return Site(
    path=(),
    inputs=math.prod(params[view.kernel].shape) // outputs,
    outputs=outputs,
    kernel=kernel,
    bias=bias,
    view=view,
    project=project,
    multiply=multiply,
    dtype=dtype,
    rows=rows,
  )


def flat_kernel(
  leaves: Params,
  stack: tuple[int, ...],
  outputs: int,
  view: View = MATRIX,
) -> Float[Array, "*stack i o"]:
  """A layer's kernel as (*stack, i, o), dequantised where it is quantised."""
  kernel = leaves[view.kernel]
  if is_quantised(kernel):
    kernel = dequantise(kernel).reshape(kernel.shape)
  if view.axes:
    kernel = jnp.transpose(kernel, _stacked(view, stack))
  return kernel.reshape(*stack, -1, outputs)


def own_kernel(
  flat: Float[Array, "*stack i o"],
  shape: tuple[int, ...],
  stack: tuple[int, ...],
  view: View,
) -> Array:
  """The kernel in the layer's own shape: `flat_kernel`'s inverse."""
  if not view.axes:
    return flat.reshape(shape)
  order = _stacked(view, stack)
  turned = flat.reshape([shape[a] for a in order])
  return turned.transpose([order.index(a) for a in range(len(order))])


def flat_bias(
  leaves: Params, stack: tuple[int, ...]
) -> Float[Array, "*stack o"] | None:
  """A layer's bias as (*stack, o); None where it has none."""
  return leaves["bias"].reshape(*stack, -1) if "bias" in leaves else None


def _stacked(view: View, stack: tuple[int, ...]) -> list[int]:
  axes = (len(stack) + axis for axis in view.axes)
  return [*range(len(stack)), *axes]


def promoted(
  layer: Any, x: Array, params: Params, name: str
) -> tuple[Array, Array | None]:
  """x and the flat bias in the type that the layer computes in."""
  like = jnp.zeros((), params[name].dtype)
  bias = flat_bias(params, ())
  x, bias, _ = layer.promote_dtype(x, bias, like, dtype=layer.dtype)
  return x, bias
