"""An einsum of x and a kernel, seen as a product of two matrices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from vera_jax.adapters.interface import Matrix, View
from vera_jax.adapters.layer_calls import Product


def by_equation(
  kind: str,
  name: str,
  equation: str,
  x: Array,
  shape: tuple[int, ...],
  dtype: DTypeLike,
  call: Callable[[Array, Array], Array],
) -> Product | str:
  """An einsum of x and a kernel as a product; a reason where it is none.

  The kernel's axes that x has too and the result has not are the inputs, in the
  kernel's order; those that only the result has are the outputs, in its order.

  Args:
    kind, name: the layer's class and its parameter's name.
    equation: as of `jnp.einsum`, x first.
    shape: the kernel's; `dtype`: as in `Product`.
    call: (x, kernel) -> result, as the layer itself does it.
  """
  found = _letters(equation, x.ndim)
  if isinstance(found, str):
    return f"of its equation {equation!r}, {found}"
  of_x, of_kernel, of_result = found
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
  width = dict(zip(of_kernel, shape, strict=True))
  length = dict(zip(of_x, x.shape, strict=True))
  in_shape, out_shape = [width[a] for a in inputs], [width[a] for a in outputs]
  row_shape = [length[a] for a in rows]
  result = jax.eval_shape(call, x, jax.ShapeDtypeStruct(shape, dtype))
  if result.shape != tuple((length | width)[a] for a in of_result):
    return f"it does not return what its equation {equation!r} says"

  def ordered(array: Array, now: list[str], wanted: list[str]) -> Array:
    return array.transpose([now.index(a) for a in wanted])

  def multiply(x: Array, kernel: Array) -> Array:
    if kernel.shape[-1] < math.prod(out_shape):
      return project(x, kernel)
    x = ordered(x.reshape(*row_shape, *in_shape), rows + inputs, of_x)
    kernel = kernel.reshape(*in_shape, *out_shape)
    kernel = ordered(kernel, inputs + outputs, of_kernel)
    y = ordered(call(x, kernel), of_result, rows + outputs)
    return y.reshape(*row_shape, -1)

  def project(x: Array, matrix: Matrix) -> Array:
    return (x @ matrix).astype(result.dtype)

  def finish(y: Array) -> Array:
    y = y.reshape(*row_shape, *out_shape)
    return ordered(y, rows + outputs, of_result)

  axes = tuple(of_kernel.index(a) for a in inputs + outputs)
  return Product(
    view=View(kind, name, () if axes == tuple(sorted(axes)) else axes),
    inputs=math.prod(in_shape),
    outputs=math.prod(out_shape),
    x=ordered(x, of_x, rows + inputs).reshape(*row_shape, -1),
    dtype=dtype,
    bias=None,
    rows=math.prod(row_shape),
    multiply=multiply,
    project=project,
    finish=finish,
  )


def _letters(
  equation: str, ndim: int
) -> tuple[list[str], list[str], list[str]] | str:
  """The axes of x, kernel and result by name; x's dots are "0.", "1." ..."""
  operands, arrow, result = equation.replace(" ", "").partition("->")
  first, comma, second = operands.partition(",")
  if not arrow or not comma or "," in second or "." in second:
    return "two operands and a result are needed, the kernel without dots"
  extra = range(ndim - len(first.replace("...", "")))
  dots = [f"{i}." for i in extra]

  def letters(text: str) -> list[str]:
    before, there, after = text.partition("...")
    return [*before, *(dots if there else []), *after]

  found = letters(first), letters(second), letters(result)
  if len(found[0]) != ndim or any(len(set(x)) < len(x) for x in found):
    return "an axis is there twice, or x has another number of axes"
  return found


def is_einsum(
  call: Callable[[Array, Array], Any], equation: str, x: Array, weight: Array
) -> bool:
  """Whether a call's program is jnp.einsum's, with the weight in its own type
  or in x's, and nothing else: no turned weight, say."""
  plain = (
    lambda x, weight: jnp.einsum(equation, x, weight),
    lambda x, weight: jnp.einsum(equation, x, weight.astype(x.dtype)),
  )
  own, *known = (str(jax.make_jaxpr(f)(x, weight)) for f in (call, *plain))
  return own in known
