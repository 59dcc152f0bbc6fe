"""`nn.Einsum`, and modules of others that multiply by an equation.

The kernel's axes that x has too and the result has not are the inputs, in the
kernel's order; those that only the result has are the outputs, in its order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta
from jax import Array
from jax.typing import DTypeLike

from vera_jax.adapters.interface import Matrix, View
from vera_jax.adapters.kinds.derived import folded_call
from vera_jax.adapters.layer_calls import (
  LayerCall,
  Params,
  bound_call,
  own_call,
)
from vera_jax.adapters.layers import (
  KINDS,
  Kind,
  place_of,
  promoted,
  site_of,
)
from vera_jax.adapters.programs import is_same, reads


class Equation(NamedTuple):
  """An einsum of x and a kernel that is a product of two matrices: its axes.

  Attributes:
    x, kernel, result: all axes of each, in order; x's dots are "0.", "1." ...
    rows, inputs, outputs: those of x's rows, and those that are multiplied.
  """

  x: list[str]
  kernel: list[str]
  result: list[str]
  rows: list[str]
  inputs: list[str]
  outputs: list[str]

  def view(self, kind: str, name: str) -> View:
    """Of the kernel, with its axes in order: inputs before outputs."""
    axes = tuple(self.kernel.index(a) for a in self.inputs + self.outputs)
    return View(kind, name, () if axes == tuple(sorted(axes)) else axes)


def parse(equation: str, rank: int, shape: tuple[int, ...]) -> Equation | str:
  """Reads an equation, x first; or says why it is no product of matrices.

  Args:
    equation: as of `jnp.einsum`.
    rank: of x, which says how many axes its dots are.
    shape: of the kernel.
  """
  operands, arrow, result = equation.replace(" ", "").partition("->")
  first, comma, second = operands.partition(",")
  if not arrow or not comma or "," in second or "." in second:
    return (
      f"of its equation {equation!r}, two operands and a result are needed, the"
      " kernel without dots"
    )
  dots = [f"{i}." for i in range(rank - len(first.replace("...", "")))]

  def letters(text: str) -> list[str]:
    before, ellipsis, after = text.partition("...")
    return [*before, *(dots if ellipsis else []), *after]

  of_x, of_kernel, of_result = map(letters, (first, second, result))
  twice = any(len(set(a)) < len(a) for a in (of_x, of_kernel, of_result))
  if len(of_x) != rank or twice:
    return (
      f"of its equation {equation!r}, an axis is there twice, or x has another"
      " number of axes"
    )
  rows = [a for a in of_result if a in of_x and a not in of_kernel]
  inputs = [a for a in of_kernel if a in of_x and a not in of_result]
  outputs = [a for a in of_result if a in of_kernel and a not in of_x]
  if shared := sorted(set(of_x) & set(of_kernel) & set(of_result)):
    return (
      f"in its equation {equation!r} x, kernel and result have"
      f" {', '.join(shared)}: each entry has a kernel of its own"
    )
  if (
    len(of_kernel) != len(shape)
    or sorted(inputs + outputs) != sorted(of_kernel)
    or sorted(rows + inputs) != sorted(of_x)
    or not inputs
  ):
    return f"its equation {equation!r} is no product of x's rows and a matrix"
  return Equation(of_x, of_kernel, of_result, rows, inputs, outputs)


def by_equation(
  kind: str,
  name: str,
  equation: str,
  x: Array,
  params: Params,
  dtype: DTypeLike,
  bias: Array | None,
  multiply_whole: Callable[[Array, Array], Array],
) -> LayerCall | str:
  """An einsum of x and a kernel as a product; a reason where it is none.

  Args:
    kind, name: the layer's class and its parameter's name.
    equation: as of `jnp.einsum`, x first.
    params, dtype, bias: as in `site_of`.
    multiply_whole: (x, kernel) -> result, as the layer itself does it.
  """
  kernel = params[name]
  axes = parse(equation, x.ndim, kernel.shape)
  if isinstance(axes, str):
    return axes
  length = dict(zip(axes.x, x.shape, strict=True))
  length |= dict(zip(axes.kernel, kernel.shape, strict=True))
  row_shape, in_shape, out_shape = (
    [length[a] for a in group]
    for group in (axes.rows, axes.inputs, axes.outputs)
  )
  result = jax.eval_shape(
    multiply_whole, x, jax.ShapeDtypeStruct(kernel.shape, dtype)
  )
  expected = tuple(length[a] for a in axes.result)
  if getattr(result, "shape", None) != expected:
    return f"it does not return what its equation {equation!r} says"

  def ordered(array: Array, now: list[str], wanted: list[str]) -> Array:
    return array.transpose([now.index(a) for a in wanted])

  def multiply(x: Array, kernel: Array) -> Array:
    if kernel.shape[-1] < math.prod(out_shape):
      return project(x, kernel)  # a part of its columns
    x = x.reshape(*row_shape, *in_shape)
    x = ordered(x, axes.rows + axes.inputs, axes.x)
    kernel = kernel.reshape(*in_shape, *out_shape)
    kernel = ordered(kernel, axes.inputs + axes.outputs, axes.kernel)
    y = multiply_whole(x, kernel)
    y = ordered(y, axes.result, axes.rows + axes.outputs)
    return y.reshape(*row_shape, -1)

  def project(x: Array, matrix: Matrix) -> Array:
    return (x @ matrix).astype(result.dtype)

  def finish(y: Array) -> Array:
    y = y.reshape(*row_shape, *out_shape)
    return ordered(y, axes.rows + axes.outputs, axes.result)

  site = site_of(
    params,
    axes.view(kind, name),
    math.prod(out_shape),
    dtype=dtype,
    bias=bias,
    rows=math.prod(row_shape),
    multiply=multiply,
    project=project,
  )
  x = ordered(x, axes.x, axes.rows + axes.inputs).reshape(*row_shape, -1)
  return LayerCall(site, x, finish=finish)


def _see(
  layer: Any, params: Params, *args: Any, **kwargs: Any
) -> tuple[View, int] | str:
  inputs = [*args, *kwargs.values()]
  arrays = [x for x in inputs if hasattr(x, "ndim") and x.ndim]
  if not arrays or "kernel" not in params:
    return "its class has a call of its own, without an array or a kernel"
  equations = [x for x in inputs if isinstance(x, str)] or [layer.einsum_str]
  shape = params["kernel"].shape
  axes = parse(str(equations[0]), arrays[0].ndim, shape)
  if isinstance(axes, str):
    return axes
  outputs = [shape[axes.kernel.index(a)] for a in axes.outputs]
  return axes.view(type(layer).__name__, "kernel"), math.prod(outputs)


def _call(
  layer: Any, params: Params, inputs: Array, einsum_str: str | None = None
) -> LayerCall | str:
  """`nn.Einsum`: its equation says which of the kernel's axes are inputs."""
  x, bias = promoted(layer, inputs, params, "kernel")
  equation = einsum_str or layer.einsum_str
  bare = layer.clone(
    parent=None, name=None, use_bias=False, einsum_str=equation
  )

  def multiply_whole(x: Array, kernel: Array) -> Array:
    return own_call(bare, {"kernel": kernel}, x)

  kind = type(layer).__name__
  return by_equation(
    kind, "kernel", equation, x, params, x.dtype, bias, multiply_whole
  )


def _call_others(
  layer: Any, params: Params, /, *args: Any, **kwargs: Any
) -> LayerCall | str | None:
  """A module of anyone's that is called with an equation and x, and multiplies
  x with one parameter, as the decoders of Gemma are written.

  Beside that one others may lie, which modules have that share its scope.
  """
  inputs = [*args, *kwargs.values()]
  texts = [x for x in inputs if isinstance(x, str) and "->" in x]
  arrays = [i for i, x in enumerate(inputs) if hasattr(x, "dtype")]
  if len(texts) != 1 or len(arrays) != 1:
    return None
  (equation,), (position,) = texts, arrays
  x = inputs[position]
  bare = layer.clone(parent=None, name=None)
  variables = meta.unbox(layer.variables)
  keys = dict.fromkeys(layer.scope.rngs, jax.random.key(0))

  def run(params: Params, x: Array) -> Any:
    """The result and whatever else such a call changes."""
    every = [*inputs[:position], x, *inputs[position + 1 :]]
    named = dict(zip(kwargs, every[len(args) :], strict=True))
    return own_call(
      bare,
      {**variables["params"], **params},
      *every[: len(args)],
      others=variables,
      rngs=keys,
      mutable=DenyList(("params", "projections")),
      **named,
    )

  is_read = reads(jax.make_jaxpr(run)(params, x), params)
  read = [name for name in params if is_read[name]]
  if len(read) != 1:
    return "it is called with an equation, but reads more than one parameter"
  if layer.name in params and place_of(layer):
    return f"it shares a scope with a parameter of its name, {layer.name!r}"

  def own_code(changed: Params) -> Any:
    return bound_call(layer, changed, lambda layer: layer(*args, **kwargs))

  return product_of(
    type(layer).__name__,
    *(read[0], equation, x, params),
    lambda x, changed: run(changed, x)[0],
    own_code,
  )


def product_of(
  kind: str,
  name: str,
  equation: str,
  x: Array,
  params: Params,
  run: Callable[[Array, Params], Array],
  own_code: Callable[[Params], Any],
) -> LayerCall | str:
  """A call of anyone's module by an equation: the product, or, where its code
  does more, this code on the adapted kernel; a reason where it is none.

  Args:
    kind, name, equation, x, params: as in `by_equation`.
    run: (x, some of the parameters) -> the output, and nothing else.
    own_code: the call itself, with other values of some parameters.
  """
  weight = params[name]

  def multiply_whole(x: Array, weight: Array) -> Array:
    return run(x, {name: weight})

  call = by_equation(
    kind, *(name, equation, x, params, weight.dtype, None, multiply_whole)
  )
  shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
  if isinstance(call, str) or is_bare(multiply_whole, equation, x, shape):
    return call
  site = call.site
  return folded_call(params, site.view, site.outputs, x, own_code)


def is_bare(
  run: Callable[[Array, Array], Any],
  equation: str,
  x: Array,
  weight: jax.ShapeDtypeStruct,
) -> bool:
  """Whether a layer's own code is the equation's product and no more, with the
  weight, of which the shape is read, in its own type or in x's."""
  programs = (
    jax.make_jaxpr(product)(x, weight).jaxpr
    for product in (
      run,
      lambda x, w: jnp.einsum(equation, x, w),
      lambda x, w: jnp.einsum(equation, x, w.astype(x.dtype)),
    )
  )
  own, *bare = programs
  return any(is_same(own, program) for program in bare)


def _see_others(
  layer: Any, params: Params, /, *args: Any, **kwargs: Any
) -> tuple[View, int] | str | None:
  call = _call_others(layer, params, *args, **kwargs)
  return (
    (call.site.view, call.site.outputs) if isinstance(call, LayerCall) else call
  )


KINDS[nn.Einsum] = Kind(_see, _call)
KINDS[nn.Module] = Kind(_see_others, _call_others)
