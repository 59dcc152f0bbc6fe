"""How a call of an nnx layer is seen as `x @ kernel + bias`.

A layer of flax.nnx has a twin in flax.linen with the same fields, which makes
the same product; so what `adapters/layers.py` and `adapters/kinds/` know of
linen's layers holds for nnx's. A module of anyone's that multiplies x with one
matrix by an equation, as tunix's and Gemma's do, is taken by this equation.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from string import ascii_lowercase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from vera_jax.adapters.interface import View
from vera_jax.adapters.kinds.einsum import by_equation, is_bare, parse
from vera_jax.adapters.layer_calls import LayerCall
from vera_jax.adapters.layers import (
  KINDS,
  flat_bias,
  own_kernel,
  site_of,
)
from vera_jax.errors import UserError
from vera_jax.operations.quantised import is_quantised, is_qwix

# An adapted layer's class says which of its parameters are the adapter's, and
# which class it was before.
OWNS, UNADAPTED = "owned_by_adapter", "unadapted"
QWIX = "_unquantized_type"  # of a class by qwix: which one it derives from
PLACE = "adapted_at"  # an adapted layer's field with its path, a text
Seen = tuple[View, tuple[int, ...], int]  # view, kernel's own shape, outputs


class Projection(nnx.Param):
  """A matrix of one layer that is not trained, such as `sharing="unique"`'s."""


def _linear(layer: Any) -> nn.Module:
  return nn.Dense(layer.out_features, **_fields(layer))


def _general(layer: Any) -> nn.Module:
  batch = tuple(layer.batch_axis)
  fields = _fields(layer)
  return nn.DenseGeneral(
    layer.out_features, axis=layer.axis, batch_dims=batch, **fields
  )


def _conv(layer: Any) -> nn.Module:
  return nn.Conv(
    layer.out_features,
    layer.kernel_size,
    strides=layer.strides,
    padding=layer.padding,
    input_dilation=layer.input_dilation,
    kernel_dilation=layer.kernel_dilation,
    feature_group_count=layer.feature_group_count,
    mask=layer.mask,
    **_fields(layer),
  )


def _einsum(layer: Any) -> nn.Module:
  shape = layer.kernel_shape
  fields = _fields(layer)
  return nn.Einsum(shape, layer.einsum_str, **fields)


def _embed(layer: Any) -> nn.Module:
  return nn.Embed(layer.num_embeddings, layer.features, dtype=layer.dtype)


def _fields(layer: Any) -> dict[str, Any]:
  return {
    "use_bias": getattr(layer, "bias", None) is not None,
    "dtype": layer.dtype,
    "precision": layer.precision,
  }


TWINS: dict[type, Callable[[Any], nn.Module]] = {
  nnx.Linear: _linear,
  nnx.LinearGeneral: _general,
  nnx.Conv: _conv,
  nnx.Einsum: _einsum,
  nnx.Embed: _embed,
}
# Fields in which a layer may hold a function, and what flax puts there.
HOOKS = {
  "promote_dtype": promote_dtype,
  "dot_general": (None, lax.dot_general),
  "dot_general_cls": None,
  "conv_general_dilated": lax.conv_general_dilated,
  "einsum_op": jnp.einsum,
  "preferred_element_type": None,
}


def values_of(layer: nnx.Module) -> dict[str, Any]:
  """A module's own parameters, without an adapter's and those of modules in
  it."""
  owns = getattr(type(layer), OWNS, lambda name: False)
  return {
    name: value
    for name, variable in vars(layer).items()
    if (value := value_of(variable, without=Projection)) is not None
    and not owns(name)
  }


def value_of(
  variable: Any, *, without: type[nnx.Variable] | tuple[()] = ()
) -> Any:
  """A parameter's array, or qwix's codes of it; None for what is no parameter
  or of the type that is left out."""
  if isinstance(variable, nnx.Param) and not isinstance(variable, without):
    return variable.get_value()
  codes = getattr(variable, "array", None)  # as qwix's `WithAux` holds them
  if not is_qwix(codes):
    return None
  return jax.tree.map(
    lambda part: part.get_value(),
    codes,
    is_leaf=lambda part: isinstance(part, nnx.Variable),
  )


def twin_of(layer: nnx.Module, base: type) -> nn.Module | None:
  """The linen layer that computes the same; None where nobody knows one.

  Args:
    layer: the layer.
    base: its class before it was adapted.
  """
  kind = next((x for x in base.__mro__ if x in TWINS), None)
  if kind is None or base is not kind:
    return None
  for name, usual in HOOKS.items():
    choices = usual if isinstance(usual, tuple) else (usual,)
    if not any(getattr(layer, name, choices[0]) is one for one in choices):
      return None
  return TWINS[kind](layer)


def see(layer: Any, base: type, axis: int = 0) -> Seen | str | None:
  """How the kernel is seen before there is a call; or why the layer can't be
  adapted, or None for a module without a matrix of its own.

  Args:
    layer: the layer.
    base: its class before it was adapted.
    axis: on which its kernel is stacked, if it is.
  """
  params = values_of(layer)
  kind = next((x for x in base.__mro__ if x in TWINS), None)
  matrices = [name for name, value in params.items() if _rank(value) > 1]
  if by_qwix := [name for name in params if name.endswith("_lora_a")]:
    return f"it has qwix's LoRA, {by_qwix[0]}: apply one or the other"
  if not matrices:
    return None
  if odd := [n for n in matrices if not hasattr(params[n], "ndim")]:
    return f"its {odd[0]} is a {type(params[odd[0]]).__name__} and no array"
  if kind is not None:
    twin = TWINS[kind](layer)
    shape = _own_shape(layer, kind)
    own = {**params, "kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    inputs = []
    if kind is nnx.Einsum:
      if layer.einsum_str is None:
        return "it has no equation of its own, but is given one at each call"
      inputs = [_example(layer.einsum_str)]
    seen = KINDS[type(twin)].seen(twin, own, *inputs)
    if seen is None or isinstance(seen, str):
      return seen
    view, outputs = seen
    if twin_of(layer, base) is None:
      view = view._replace(plans=("folded",))
    return view._replace(kind=kind.__name__), shape, outputs
  equation = _equation(layer, ()) or _dense_equation(layer)
  if equation is None:
    return f"its class {base.__name__} has no equation that says what it does"
  if len(matrices) > 1:
    return f"it holds several matrices: {', '.join(matrices)}"
  (name,) = matrices
  operands = equation.partition("->")[0].partition(",")[2].replace(" ", "")
  shape = params[name].shape
  shape = shape[:axis] + shape[axis + len(shape) - len(operands) :]
  axes = parse(equation, _example(equation).ndim, shape)
  if isinstance(axes, str):
    return axes
  outputs = math.prod(shape[axes.kernel.index(a)] for a in axes.outputs)
  return axes.view(base.__name__, name), shape, outputs


def see_call(
  layer: nnx.Module, base: Any, args: Any, kwargs: Any
) -> LayerCall | str:
  """What a call of a layer is, as one product; or why it can't be adapted.

  Args:
    layer: whose kernel is that of one layer, as inside a scan.
    base: its class before it was adapted.
    args, kwargs: of the call.
  """
  seen = see(layer, base)
  if seen is None or isinstance(seen, str):
    return seen or "it has no matrix"
  view, _, outputs = seen
  params = values_of(layer)
  given = {name: x for name, x in kwargs.items() if x is not None}
  twin = twin_of(layer, base)
  if twin is not None and len(args) == 1 and not given:
    call = KINDS[type(twin)].call(twin, params, *args)
    assert call is not None
    return call
  arrays = [i for i, x in enumerate(args) if hasattr(x, "dtype")]
  if not arrays or len(arrays) > 1:
    return "it is called without an array, or with several"
  (at,) = arrays
  x, name = args[at], view.kernel

  def run(x: Any, changed: Mapping[str, Any]) -> Any:
    inputs = [*args[:at], x, *args[at + 1 :]]
    return base.__call__(bare(layer, base, changed), *inputs, **kwargs)

  def own_code(kernel: Any, bias: Any) -> Any:
    changed = {name: own_kernel(kernel, params[name].shape, (), view)}
    if bias is not None:
      changed["bias"] = bias.reshape(params["bias"].shape)
    return run(x, changed)

  equation = _equation(layer, args) or _dense_equation(layer)
  if twin is None and equation and not any(c in TWINS for c in base.__mro__):
    weight = params[name]
    call = by_equation(
      base.__name__,
      *(name, equation, x, params, weight.dtype, None),
      lambda x, weight: run(x, {name: weight}),
    )
    if isinstance(call, str):
      return call
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    if is_bare(lambda x, w: run(x, {name: w}), equation, x, shape):
      return call
  site = site_of(
    params,
    view._replace(plans=("folded",)),
    outputs,
    dtype=params[name].dtype,
    bias=flat_bias(params, ()),
    rows=x.size // x.shape[-1],
  )
  return LayerCall(site, x, own_code=own_code)


def beside_qwix(act: Callable[..., Any]) -> Callable[..., Any]:
  """A function of an adapted layer, in whose calls qwix quantises nothing: it
  would take the adapter's matrices for weights.

  Raises:
    UserError: qwix is to do more with the layer than to hold its kernel, which
      is dequantised here.
  """

  @wraps(act)
  def call(layer: Any, *args: Any) -> Any:
    if "qwix" not in sys.modules:
      return act(layer, *args)
    from qwix._src.interception import disable_interceptions
    from qwix.pallas import get_current_rule

    # qwix finds the layer among the functions that are running
    rules = map(get_current_rule, ("dot_general", "einsum"))
    if why := next(filter(None, (_unfit(layer, x) for x in rules if x)), None):
      raise UserError(f"{vars(layer)[PLACE]} can't be adapted: {why}.")
    return disable_interceptions(act)(layer, *args)

  return call


def _unfit(layer: Any, rule: Any) -> str | None:
  """Why a layer can't be adapted with qwix's rule for it, if it can't."""
  if rule.act_qtype is not None:
    return (
      "qwix's rule for it quantises x too (act_qtype), but an adapted layer"
      " takes x as it is. Give a rule without act_qtype, or leave the layer out"
      " of the targets"
    )
  quantised = any(map(is_quantised, values_of(layer).values()))
  if rule.weight_qtype is not None and not quantised:
    return (
      "qwix's rule quantises its kernel in each call. Quantise the plain model"
      " by qwix.quantize_model with a PtqProvider, and adapt it then"
    )
  return None


def bare(layer: nnx.Module, base: type, changed: Mapping[str, Any]) -> Any:
  """The layer as its own class has it, with other values of some parameters."""
  other: Any = object.__new__(base)
  vars(other).update(vars(layer))
  for name, value in changed.items():
    variable = vars(layer)[name]
    coded = not isinstance(variable, nnx.Param)
    vars(other)[name] = nnx.Param(value) if coded else variable.replace(value)
  return other


def lora_shapes(
  layer: Any, axis: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes of inputs and of outputs in qwix's LoRA matrices: an equation's
  stay apart, in the kernel's order."""
  seen = see(layer, getattr(type(layer), UNADAPTED), axis)
  assert isinstance(seen, tuple)
  _, shape, outputs = seen
  equation = _equation(layer, ())
  if equation is None:
    return (math.prod(shape) // outputs,), (outputs,)
  axes = parse(equation, _example(equation).ndim, shape)
  assert not isinstance(axes, str)
  length = dict(zip(axes.kernel, shape, strict=True))
  return tuple(length[a] for a in axes.inputs), tuple(
    length[a] for a in axes.outputs
  )


def _own_shape(layer: Any, kind: type) -> tuple[int, ...]:
  """Of the kernel of one layer, whether it is stacked or not."""
  if kind is nnx.Embed:
    return layer.num_embeddings, layer.features
  if kind is nnx.Linear:
    return layer.in_features, layer.out_features
  if kind is nnx.LinearGeneral:
    batch = tuple(layer.batch_axis.values())
    return *batch, *layer.in_features, *layer.out_features
  return tuple(layer.kernel_shape)


def _equation(layer: nnx.Module, args: Any) -> str | None:
  """The one equation that a module is called with, or holds."""
  texts = [x for x in (*args, *vars(layer).values()) if isinstance(x, str)]
  equations = [text for text in texts if "->" in text]
  return equations[0] if equations else None


def _dense_equation(layer: Any) -> str | None:
  """What layers compute that hold no equation: the last axes of x times the
  kernel, as MaxText's `DenseGeneral` and bonsai's `ShardedLinear`."""
  if not hasattr(layer, "in_features_shape"):
    dense = values_of(layer).keys() | {"bias"} == {"kernel", "bias"}
    return "...i,io->...o" if dense else None
  ins = layer.in_features_shape
  if tuple(layer.axis) != tuple(range(-len(ins), 0)):
    return None
  letters = ascii_lowercase[: len(ins) + len(layer.out_features_shape)]
  first, second = letters[: len(ins)], letters[len(ins) :]
  return f"...{first},{letters}->...{second}"


def _example(equation: str) -> Any:
  """An array, without values, of as many axes as the equation's x has."""
  letters = equation.replace(" ", "").partition(",")[0].replace("...", "*")
  return jax.ShapeDtypeStruct((1,) * len(letters), jnp.float32)


def _rank(value: Any) -> int:
  return len(getattr(value, "shape", ()))
