"""How a call of an nnx layer is seen as `x @ kernel + bias`.

A layer of flax.nnx has a twin in flax.linen with the same fields, which makes
the same product; so what `adapters/layers.py` and `adapters/kinds/` know of
linen's layers holds for nnx's. A module of anyone's that multiplies x with one
matrix by an equation, as tunix's and Gemma's do, is taken by this equation.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial, wraps
from string import ascii_lowercase
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from vera_jax.adapters.interface import View
from vera_jax.adapters.kinds.derived import folded_call
from vera_jax.adapters.kinds.einsum import parse, product_of
from vera_jax.adapters.layer_calls import LayerCall
from vera_jax.adapters.layers import HOOKS, KINDS
from vera_jax.errors import UserError
from vera_jax.operations.quantised import is_quantised, is_qwix

# Of an adapted layer's class: its adapter, and which class it was before.
ROOT, UNADAPTED = "adapted_by", "unadapted"
QWIX = "_unquantized_type"  # of a class by qwix: which one it derives from
PLACE = "adapted_at"  # an adapted layer's field with its path, a text
# nnx's layers, linen's, and the fields with the shape of one layer's kernel.
TWINS: dict[type, tuple[type[nn.Module], tuple[str, ...]]] = {
  nnx.Linear: (nn.Dense, ("in_features", "out_features")),
  nnx.LinearGeneral: (nn.DenseGeneral, ("in_features", "out_features")),
  nnx.Conv: (nn.Conv, ("kernel_shape",)),
  nnx.Einsum: (nn.Einsum, ("kernel_shape",)),
  nnx.Embed: (nn.Embed, ("num_embeddings", "features")),
}
# Linen's fields that have other names in nnx.
RENAMED = {
  "features": "out_features",
  "shape": "kernel_shape",
  "batch_dims": "batch_axis",
}
FUNCTIONS = (*HOOKS, "einsum_op", "preferred_element_type")


class Projection(nnx.Param):
  """A matrix of one layer that is not trained, such as `sharing="unique"`'s."""


class Seen(NamedTuple):
  """How a kernel is seen before there is a call.

  Attributes:
    view: of the kernel.
    shape: of one layer's kernel, whether it is stacked or not.
    inputs, outputs: its axes, apart where an equation has them apart.
  """

  view: View
  shape: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def values_of(layer: nnx.Module) -> dict[str, Any]:
  """A module's own parameters, without an adapter's and those of modules in
  it."""
  adaptation = getattr(type(layer), ROOT, None)
  return {
    name: value
    for name, variable in vars(layer).items()
    if (value := value_of(variable)) is not None
    and not isinstance(variable, Projection)
    and not (adaptation and adaptation.adapter.owns(name))
  }


def value_of(variable: Any) -> Any:
  """A parameter's array, or qwix's codes of it; None for what is neither."""
  if isinstance(variable, nnx.Param):
    return variable.get_value()
  codes = getattr(variable, "array", None)  # as qwix's `WithAux` holds them
  if not is_qwix(codes):
    return None
  return jax.tree.map(
    lambda part: part.get_value(),
    codes,
    is_leaf=lambda part: isinstance(part, nnx.Variable),
  )


def _kind(base: type) -> type | None:
  """The layer of flax's that a class is or derives from."""
  return next((x for x in base.__mro__ if x in TWINS), None)


def _linen(layer: Any, kind: type) -> nn.Module:
  """The linen layer with the same fields."""
  linen, _ = TWINS[kind]
  own = {**vars(layer), "use_bias": getattr(layer, "bias", None) is not None}
  values = {}
  for name in {x.name for x in fields(linen)} - {"parent", "name", *FUNCTIONS}:
    here = RENAMED.get(name, name)
    here = here if here in own else name
    if here in own:
      values[name] = own[here]
  return linen(**values)


def twin_of(layer: nnx.Module, base: Any) -> nn.Module | None:
  """The linen layer that computes the same; None where nobody knows one, or a
  field has a function of the layer's own.

  Args:
    layer: the layer.
    base: its class before it was adapted.
  """
  if base not in TWINS:
    return None
  usual = inspect.signature(base.__init__).parameters
  changed = any(
    getattr(layer, name) is not usual[name].default
    for name in FUNCTIONS
    if name in usual
  )
  return None if changed else _linen(layer, base)


def see(layer: Any, base: type, axis: int = 0) -> Seen | str | None:
  """How the kernel is seen; or why the layer can't be adapted, or None for a
  module without a matrix of its own.

  Args:
    layer: the layer.
    base: its class before it was adapted.
    axis: on which its kernel is stacked, if it is.
  """
  params, kind = values_of(layer), _kind(base)
  matrices = [
    name for name, x in params.items() if len(getattr(x, "shape", ())) > 1
  ]
  if by_qwix := [name for name in params if name.endswith("_lora_a")]:
    return f"it has qwix's LoRA, {by_qwix[0]}: apply one or the other"
  if not matrices:
    return None
  if odd := [n for n in matrices if not hasattr(params[n], "ndim")]:
    return f"its {odd[0]} is a {type(params[odd[0]]).__name__} and no array"
  equation = _equation(layer, kind)
  if kind is nnx.Einsum and equation is None:
    return "it has no equation of its own, but is given one at each call"
  if kind is not None:
    parts = [getattr(layer, name) for name in TWINS[kind][1]]
    shape = tuple(jax.tree.leaves(parts))
  elif equation is None:
    return f"its class {base.__name__} has no equation that says what it does"
  elif len(matrices) > 1:
    return f"it holds several matrices: {', '.join(matrices)}"
  else:
    shape = params[matrices[0]].shape
    stacked = len(shape) - len(_operands(equation)[1])
    shape = shape[:axis] + shape[axis + stacked :]
  if equation is not None:
    axes = parse(equation, len(_operands(equation)[0]), shape)
    if isinstance(axes, str):
      return axes
    length = dict(zip(axes.kernel, shape, strict=True))
    ins, outs = (
      tuple(length[a] for a in group) for group in (axes.inputs, axes.outputs)
    )
    view = axes.view(base.__name__, "kernel" if kind else matrices[0])
  else:
    assert kind is not None
    linen = _linen(layer, kind)
    of_one = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    seen = KINDS[type(linen)].seen(linen, of_one)
    if seen is None or isinstance(seen, str):
      return seen
    view, outputs = seen
    ins, outs = (math.prod(shape) // outputs,), (outputs,)
  if kind is not None:
    exact = twin_of(layer, base) is not None
    plans = view.plans if exact else ("folded",)
    view = view._replace(kind=kind.__name__, plans=plans)
  return Seen(view, shape, ins, outs)


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
  if not isinstance(seen, Seen):
    return seen or "it has no matrix"
  params, twin, kind = values_of(layer), twin_of(layer, base), _kind(base)
  if twin and len(args) == 1 and all(x is None for x in kwargs.values()):
    call = KINDS[type(twin)].call(twin, params, *args)
    assert call is not None
    return call
  arrays = [i for i, x in enumerate(args) if hasattr(x, "dtype")]
  if len(arrays) != 1:
    return "it is called without an array, or with several"
  (at,) = arrays
  x = args[at]

  def run(x: Any, changed: Mapping[str, Any]) -> Any:
    inputs = [*args[:at], x, *args[at + 1 :]]
    return base.__call__(bare(layer, base, changed), *inputs, **kwargs)

  own_code = partial(run, x)
  equation = _equation(layer, kind, args)
  if kind is None and equation is not None:
    named = base.__name__, seen.view.kernel
    return product_of(*named, equation, x, params, run, own_code)
  outputs = math.prod(seen.outputs)
  return folded_call(params, seen.view, outputs, x, own_code)


def beside_qwix(act: Callable[..., Any]) -> Callable[..., Any]:
  """What an `Adaptation` does for a layer, where qwix quantises nothing: it
  would take the adapter's matrices for weights.

  Raises:
    UserError: qwix is to do more with the layer than to hold its kernel, which
      is dequantised here.
  """

  @wraps(act)
  def call(adaptation: Any, layer: Any, *args: Any) -> Any:
    if "qwix" not in sys.modules:
      return act(adaptation, layer, *args)
    from qwix._src.interception import disable_interceptions
    from qwix.pallas import get_current_rule

    coded = any(map(is_quantised, values_of(layer).values()))
    # qwix finds the layer among the functions that are running
    for rule in filter(None, map(get_current_rule, ("dot_general", "einsum"))):
      anew = rule.weight_qtype is not None and not coded
      if anew or rule.act_qtype is not None:
        raise UserError(
          f"{vars(layer)[PLACE]} can't be adapted: qwix's rule for it quantises"
          " x (act_qtype), or it quantises its kernel in each call. Quantise"
          " the plain model's weights alone, by qwix.quantize_model with a"
          " PtqProvider, and adapt it then; or leave the layer out of the"
          " targets."
        )
    return disable_interceptions(act)(adaptation, layer, *args)

  return call


def check_activations(model: nnx.Module) -> None:
  """Raises a UserError where qwix quantises the inputs of some layers of a
  model, adapted or not: it passes no gradient through their rounding."""
  methods = vars(type(model)) if QWIX in vars(type(model)) else {}
  rules = [
    rule
    for method in filter(inspect.isfunction, methods.values())
    for name, value in inspect.getclosurevars(method).nonlocals.items()
    if name == "input_transform"
    for rule in value.args[0]._rules  # of the provider
  ]
  for rule in rules:
    if rule.act_qtype is not None:
      raise UserError(
        f"qwix's rule for {rule.module_path!r} quantises activations"
        " (act_qtype), and passes no gradient through their rounding, so that"
        " adapters on layers before would be trained on wrong ones. Quantise"
        " the weights alone."
      )


def bare(layer: nnx.Module, base: type, changed: Mapping[str, Any]) -> Any:
  """The layer as its own class has it, with other values of some parameters."""
  other: Any = object.__new__(base)
  vars(other).update(vars(layer))
  for name, value in changed.items():
    variable = vars(layer)[name]
    coded = not isinstance(variable, nnx.Param)
    vars(other)[name] = nnx.Param(value) if coded else variable.replace(value)
  return other


def _equation(layer: Any, kind: type | None, args: Any = ()) -> str | None:
  """What a module multiplies by, kernel behind x: the equation that it is
  called with or holds; that of flax's Einsum; or, of a module by others, the
  last axes of x times the kernel, as MaxText's `DenseGeneral` and bonsai's
  `ShardedLinear` have it. None where nothing says it."""
  if kind is not None:
    return layer.einsum_str if kind is nnx.Einsum else None
  for text in (*args, *vars(layer).values()):
    if isinstance(text, str) and "->" in text:
      return text
  if not hasattr(layer, "in_features_shape"):
    dense = values_of(layer).keys() | {"bias"} == {"kernel", "bias"}
    return "...i,io->...o" if dense else None
  ins = len(layer.in_features_shape)
  if tuple(layer.axis) != tuple(range(-ins, 0)):
    return None
  letters = ascii_lowercase[: ins + len(layer.out_features_shape)]
  return f"...{letters[:ins]},{letters}->...{letters[ins:]}"


def _operands(equation: str) -> tuple[str, str]:
  """The letters of x, its dots as one, and those of the kernel."""
  x, _, kernel = equation.replace(" ", "").partition("->")[0].partition(",")
  return x.replace("...", "*"), kernel
