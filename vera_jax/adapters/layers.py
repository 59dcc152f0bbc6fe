"""Layer kinds: how a call of a linen layer is seen as `x @ kernel + bias`.

A new kind is one function and one line in `KINDS`; docs/architectures.md has
the table in words. A kernel may be stored in fewer bits
(`operations/quantised.py`): then it is dequantised where it is used.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList, meta
from flax.linen.recurrent import DenseParams
from jax import Array
from jaxtyping import Float

from vera_jax.adapters.equations import by_equation, is_einsum
from vera_jax.adapters.interface import MATRIX, Matrix, Path, View
from vera_jax.adapters.layer_calls import (
  Params,
  Product,
  bound_call,
  own_call,
  reads,
  remembered,
)
from vera_jax.adapters.structured import as_array
from vera_jax.operations.quantised import dequantise, is_quantised

BATCH_DIMS = (
  "it has a kernel for each row (batch_dims), which no one delta fits"
)


def _dense(layer: Any, params: Params, inputs: Array) -> Product | str:
  """`nn.Dense` and `nn.DenseGeneral`, with any axes and features."""
  if getattr(layer, "batch_dims", ()):
    return BATCH_DIMS
  axis, features = getattr(layer, "axis", -1), layer.features
  axes = axis if isinstance(axis, Sequence) else (axis,)
  axes = tuple(sorted(a % inputs.ndim for a in axes))
  features = tuple(features) if isinstance(features, Sequence) else (features,)
  x = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
  x = x.reshape(*x.shape[: -len(axes)], -1)
  x, bias = _promoted(layer, x, params, "kernel")
  own = layer.precision, layer.dot_general, layer.dot_general_cls
  plain = own == (None, None, None)

  def multiply(x: Array, kernel: Array) -> Array:
    if plain:
      return x @ kernel
    dot = layer.dot_general or jax.lax.dot_general
    if layer.dot_general_cls is not None:
      dot = layer.dot_general_cls()
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return dot(x, kernel, contract, precision=layer.precision)

  view = View(type(layer).__name__)
  return Product(
    # nothing is folded into another order behind a dot_general's back
    view=view if plain else view._replace(plans=("factored",)),
    inputs=x.shape[-1],
    outputs=math.prod(features),
    x=x,
    dtype=x.dtype,
    bias=bias,
    rows=math.prod(x.shape[:-1]),
    multiply=multiply,
    finish=lambda y: y.reshape(*y.shape[:-1], *features),
    plain=plain,
  )


def _conv(layer: Any, params: Params, inputs: Array) -> Product:
  """`nn.Conv`: a window's taps times its channels are the inputs.

  A layer that sees its inputs in groups or masks its kernel is only folded.
  """
  kernel = params["kernel"]
  *window, channels, outputs = kernel.shape
  x, bias = _promoted(layer, inputs, params, "kernel")
  bare = layer.clone(parent=None, name=None, use_bias=False)

  def project(x: Array, matrix: Matrix) -> Array:
    wide = bare.clone(features=matrix.shape[-1])
    matrix = as_array(matrix, x.dtype)
    own = {"kernel": matrix.reshape(*window, channels, -1)}
    return own_call(wide, own, x)

  groups = layer.feature_group_count
  folded_only = groups > 1 or layer.mask is not None
  whole = math.prod(window) * channels, outputs
  y = jax.eval_shape(project, x, jax.ShapeDtypeStruct(whole, x.dtype))
  kind = type(layer).__name__
  view = View(kind, taps=math.prod(window), groups=groups, forms=True)
  return Product(
    view=view._replace(plans=("folded",)) if folded_only else view,
    inputs=whole[0],
    outputs=outputs,
    x=x,
    dtype=x.dtype,
    bias=bias,
    rows=math.prod(y.shape[:-1]),
    multiply=project,
    project=project,
  )


def _embed(layer: Any, params: Params, inputs: Array) -> Product | str:
  """`nn.Embed`: one-hot rows times the table, made by looking rows up.

  `attend`, the tied output layer, has the adapted table too
  (`intercept.py`).
  """
  if layer.num_embeddings == 1:
    return (
      "with a single row flax returns that row without a look-up, so there is"
      " nothing to adapt"
    )
  table = params["embedding"]
  (like,) = layer.promote_dtype(
    jnp.zeros((), table.dtype), dtype=layer.dtype, inexact=False
  )

  def take(ids: Array, table: Matrix) -> Array:
    return jnp.take(as_array(table, like.dtype), ids, axis=0)

  view = View(type(layer).__name__, "embedding", looked_up=True, forms=True)
  return Product(
    view=view._replace(plans=("factored", "folded")),
    inputs=table.shape[0],
    outputs=table.shape[1],
    x=inputs,
    dtype=like.dtype,
    bias=None,
    rows=inputs.size,
    multiply=take,
    project=take,
  )


def _params(layer: Any, params: Params, inputs: Array) -> Product:
  """`DenseParams`, the gates of `nn.OptimizedLSTMCell`: (kernel, bias) is what
  they return, so that a delta can only be folded into it."""
  kernel = params["kernel"]
  return Product(
    view=View(type(layer).__name__, plans=("folded",)),
    inputs=kernel.shape[0],
    outputs=kernel.shape[1],
    x=inputs,
    dtype=kernel.dtype,
    bias=params.get("bias"),
    rows=math.prod(inputs.shape[:-1]),
    call=lambda kernel, bias: (kernel, bias),
  )


def _einsum(
  layer: Any, params: Params, inputs: Array, einsum_str: str | None = None
) -> Product | str:
  """`nn.Einsum`: its equation says which of the kernel's axes are inputs."""
  x, bias = _promoted(layer, inputs, params, "kernel")
  equation = einsum_str or layer.einsum_str
  bare = layer.clone(
    parent=None, name=None, use_bias=False, einsum_str=equation
  )

  def call(x: Array, kernel: Array) -> Array:
    return own_call(bare, {"kernel": kernel}, x)

  shape = params["kernel"].shape
  kind = type(layer).__name__
  made = by_equation(kind, "kernel", equation, x, shape, x.dtype, call)
  return made if isinstance(made, str) else made._replace(bias=bias)


def _own_einsum(
  layer: Any, params: Params, /, *args: Any, **kwargs: Any
) -> Product | str | None:
  """A module of anyone's that is called with an equation and x, and multiplies
  x with one parameter, as the decoders of Gemma are written.

  Beside that one others may lie, which modules have that share its scope.
  """
  given = [*args, *kwargs.values()]
  texts = [x for x in given if isinstance(x, str) and "->" in x]
  arrays = [i for i, x in enumerate(given) if hasattr(x, "dtype")]
  if len(texts) != 1 or len(arrays) != 1 or not params:
    return None
  (place,), x = arrays, given[arrays[0]]
  bare = layer.clone(parent=None, name=None)
  variables = meta.unbox(layer.variables)
  keys = dict.fromkeys(layer.scope.rngs, jax.random.key(0))

  def whole(params: Params, x: Array) -> Any:
    """The result and whatever else such a call changes."""
    own = [*given[:place], x, *given[place + 1 :]]
    named = dict(zip(kwargs, own[len(args) :], strict=True))
    return own_call(
      bare,
      {**variables["params"], **params},
      *own[: len(args)],
      others=variables,
      rngs=keys,
      mutable=DenyList(("params", "projections")),
      **named,
    )

  found = reads(jax.make_jaxpr(whole)(params, x), params)
  read = [name for name in params if found[name]]
  if len(read) != 1:
    return "it is called with an equation, but reads more than one parameter"
  if layer.name in params and place_of(layer):
    return f"it shares a scope with a parameter of its name, {layer.name!r}"
  (name,), weight = read, params[read[0]]

  def call(x: Array, weight: Array) -> Array:
    return whole({name: weight}, x)[0]

  kind, dtype = type(layer).__name__, weight.dtype
  made = by_equation(kind, name, texts[0], x, weight.shape, dtype, call)
  if isinstance(made, str):
    return made
  if is_einsum(lambda x, w: whole({name: w}, x), texts[0], x, weight):
    return made
  return _by_own_code(layer, params, made, args, kwargs)


def _derived(
  layer: Any, params: Params, args: Any, kwargs: Mapping[str, Any]
) -> Product | str:
  """A layer that is one of flax's by its class, and computes something else:
  which product it makes is unknown, which kernel it has isn't."""
  if getattr(layer, "batch_dims", ()):
    return BATCH_DIMS
  view = View(type(layer).__name__)
  if isinstance(layer, nn.Embed):
    view = view._replace(kernel="embedding", looked_up=True)
  if view.kernel not in params:
    return f"its class has a call of its own, and no parameter {view.kernel!r}"
  kernel = params[view.kernel]
  given = [*args, *kwargs.values()]
  arrays = [x for x in jax.tree.leaves(given) if hasattr(x, "ndim") and x.ndim]
  if not arrays:
    return "its class has a call of its own, which was given no array"
  if isinstance(layer, nn.Einsum):
    texts = [x for x in given if isinstance(x, str)]
    equation = str(texts[0] if texts else layer.einsum_str)
    made = by_equation(
      view.kind,
      view.kernel,
      equation,
      arrays[0],
      kernel.shape,
      kernel.dtype,
      lambda x, kernel: jnp.einsum(equation, x, kernel),
    )
    if isinstance(made, str):
      return made
    view, outputs = made.view, made.outputs
  elif isinstance(layer, nn.DenseGeneral):
    outputs = int(np.prod(layer.features))
  else:
    outputs = kernel.shape[-1]
  if isinstance(layer, nn.Conv):
    taps = math.prod(kernel.shape[:-2])
    view = view._replace(taps=taps, groups=layer.feature_group_count)
  made = Product(
    view=view,
    inputs=math.prod(kernel.shape) // outputs,
    outputs=outputs,
    x=arrays[0],
    dtype=kernel.dtype,
    bias=flat_bias(params, ()),
    rows=arrays[0].size // arrays[0].shape[-1],
  )
  return _by_own_code(layer, params, made, args, kwargs)


def _by_own_code(
  layer: Any,
  params: Params,
  made: Product,
  args: Any,
  kwargs: Mapping[str, Any],
) -> Product:
  """The product, made by the layer's own call with another kernel and bias."""
  name = made.view.kernel

  def call(kernel: Array, bias: Array | None) -> Any:
    own = {name: own_kernel(kernel, params[name].shape, (), made.view)}
    if bias is not None:
      own["bias"] = bias.reshape(params["bias"].shape)
    return bound_call(layer, own, lambda layer: layer(*args, **kwargs))

  view = made.view._replace(plans=("folded",))
  return made._replace(view=view, call=call)


See = Callable[..., Product | str | None]
# The first kind that a layer is an instance of: what a call of it is, or a
# reason why it can't be adapted; None for a module that is no layer. Of a layer
# that computes something else, `_derived` says it.
KINDS: dict[type[nn.Module], See] = {
  nn.Dense: _dense,
  nn.DenseGeneral: _dense,
  nn.Einsum: _einsum,
  nn.Conv: _conv,
  nn.Embed: _embed,
  DenseParams: _params,
  nn.Module: _own_einsum,
}
LINEAR = ("Dense", "DenseGeneral")
# Fields of these classes that hold a function which computes something.
HOOKS = (
  "promote_dtype",
  "dot_general",
  "dot_general_cls",
  "conv_general_dilated",
  "conv_general_dilated_cls",
)


def product_of(
  layer: nn.Module,
  params: Params,
  args: Any,
  kwargs: Any,
  *,
  intercepted: bool = False,
) -> Product | str | None:
  """The product that a call of `layer.__call__` makes, by `KINDS`.

  Args:
    layer: bound.
    params: its own parameters, without an adapter's.
    args, kwargs: of the call.
    intercepted: whether the model has put code of its own around the call, by
      `nn.intercept_methods`.
  """
  kind = next(kind for kind in KINDS if isinstance(layer, kind))
  if kind is nn.Module:
    made = _own_einsum(layer, params, *args, **kwargs)
    if intercepted and isinstance(made, Product):
      return _by_own_code(layer, params, made, args, kwargs)
    return made
  if not params:
    return None  # it is bound to parameters of another module
  if intercepted or not _is_flaxs(layer, kind, params, args, kwargs):
    return _derived(layer, params, args, kwargs)
  return KINDS[kind](layer, params, *args, **kwargs)


def _is_flaxs(
  layer: nn.Module,
  kind: type[nn.Module],
  params: Params,
  args: Any,
  kwargs: Mapping[str, Any],
) -> bool:
  """Whether a layer computes what flax's class does with its parameters.

  A class derived from it may change a parameter on its way into an inherited
  call, as a standardised convolution does by its `param`, and a field may be a
  function that does anything. So it is the programs that are compared, once
  per layer class, fields and shapes.
  """
  hooks = (name for name in HOOKS if hasattr(kind, name))
  if type(layer) is kind and all(
    getattr(layer, name) is getattr(kind, name) for name in hooks
  ):
    return True
  if type(layer).__call__ is not kind.__call__:
    return False
  others = {
    name: tree
    for name, tree in meta.unbox(layer.variables).items()
    if name not in ("params", "projections")
  }
  bare = layer.clone(parent=None, name=None)
  assert layer.scope is not None
  streams = tuple(layer.scope.rngs)
  changed = tuple(x for x in others if layer.is_mutable_collection(x))
  call = params, others, args, kwargs
  return remembered(_same_program, call, bare, kind, streams, changed)


@lru_cache(maxsize=256)
def _same_program(
  structure: Any,
  inputs: tuple[Any, ...],
  layer: nn.Module,
  kind: type[nn.Module],
  streams: tuple[str, ...],
  changed: tuple[str, ...],
) -> bool:
  fields = {
    field.name: getattr(layer, field.name)
    for field in dataclasses.fields(kind)
    if field.name not in (*HOOKS, "parent", "name")
  }

  def program(layer: nn.Module) -> str:
    def run(arrays: Mapping[int, Array]) -> Any:
      every = [arrays.get(i, x) for i, x in enumerate(inputs)]
      params, others, args, kwargs = jax.tree.unflatten(structure, every)
      keys = dict.fromkeys(streams, jax.random.key(0))
      options = {"others": others, "rngs": keys, "mutable": changed, **kwargs}
      return own_call(layer, params, *args, **options)[0]

    arrays = {i: x for i, x in enumerate(inputs) if hasattr(x, "shape")}
    return str(jax.make_jaxpr(run)(arrays))

  try:
    return program(layer) == program(kind(**fields))
  except Exception:  # it runs in its model alone: then its own code is used
    return False


def place_of(layer: nn.Module) -> Path:
  """Where below its scope the leaves of a layer lie: its name, where it is no
  layer of flax's and shares another module's scope, which has the kernels of
  several; () else."""
  known = any(
    isinstance(layer, kind) for kind in KINDS if kind is not nn.Module
  )
  if known or layer.name is None or layer.path[-1:] == (layer.name,):
    return ()
  return (layer.name,)


def cell_rows(args: Any, kwargs: Any) -> int:
  """The rows that a recurrent cell's kernels see in a call of it, or of
  `nn.RNN`: those of all time steps."""
  given = jax.tree.leaves((args, kwargs))
  return max(x.size // x.shape[-1] for x in given if jnp.ndim(x))


def in_cell(view: View) -> View:
  """A kernel of two axes in a recurrent cell: folded once for all time steps,
  or factored in each."""
  plans = tuple(x for x in view.plans if x in ("factored", "folded"))
  return view._replace(plans=plans)


def flat_kernel(
  leaves: Params,
  stack: tuple[int, ...],
  outputs: int,
  view: View = MATRIX,
) -> Float[Array, "*stack i o"]:
  """A layer's kernel as (*stack, i, o), dequantised where it is quantised."""
  kernel = leaves[view.kernel]
  if is_quantised(kernel):
    return dequantise(kernel)
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
  own = (len(stack) + axis for axis in view.axes)
  return [*range(len(stack)), *own]


def _promoted(
  layer: Any, x: Array, params: Params, name: str
) -> tuple[Array, Array | None]:
  """x and the flat bias in the type that the layer computes in."""
  like = jnp.zeros((), params[name].dtype)
  bias = flat_bias(params, ())
  x, bias, _ = layer.promote_dtype(x, bias, like, dtype=layer.dtype)
  return x, bias
