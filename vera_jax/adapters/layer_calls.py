"""A layer's call: seen as one product, and its own code on other weights."""

import operator
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.adapters.interface import EMPTY, Matrix, Path, View

Params = Mapping[str, Any]  # a layer's own parameters


class Product(NamedTuple):
  """A layer's call, seen as one product.

  Attributes:
    view: of the kernel.
    inputs, outputs: i and o.
    x: (*t, i), or what else `multiply` takes: of a convolution its images, of
      an embedding the numbers of rows.
    dtype: of the kernel when it is multiplied with.
    bias: (o,), of that type; None where there is none.
    rows: of all t.
    multiply: (x, kernel (i, o)) -> (*t, o), as the layer itself does it, and
      the same with a part of the columns where the layer allows to factor.
    project: (x, matrix (i, n)) -> (*t, n), as `Site.project`.
    finish: (*t, o) -> the layer's output.
    plain: whether `multiply` is `x @ kernel`.
    call: (kernel (i, o), bias (o,) or None) -> the layer's output, by code that
      may do anything with them. Where it is there, only folding is right, and
      the three functions before it are not used.
  """

  view: View
  inputs: int
  outputs: int
  x: Array
  dtype: DTypeLike
  bias: Float[Array, " _"] | None
  rows: int
  multiply: Callable[[Array, Array], Array] = operator.matmul
  project: Callable[[Array, Matrix], Array] = operator.matmul
  finish: Callable[[Array], Array] = lambda y: y
  plain: bool = False
  call: Callable[[Array, Array | None], Any] | None = None


_OWN = ContextVar("own", default=False)
_BOUND = ContextVar[tuple[Path, ...]]("bound", default=())


def own_call(
  layer: nn.Module,
  params: Params,
  *args: Any,
  others: Mapping[str, Any] = EMPTY,
  **kwargs: Any,
) -> Any:
  """An unbound layer's own code on these parameters, adapted no more.

  Args:
    layer: unbound.
    params: its parameters.
    others: its other collections.
    args, kwargs: of `apply`.
  """
  token = _OWN.set(True)
  try:
    return layer.apply({**others, "params": params}, *args, **kwargs)
  finally:
    _OWN.reset(token)


def bound_call(
  layer: nn.Module, own: Params, call: Callable[[Any], Any]
) -> Any:
  """call(layer), the layer's own code with these of its parameters replaced,
  adapted no more. The layers in it are, and it has its random keys and all of
  its variables, which it may change."""

  def run(layer: nn.Module) -> Any:
    token = _BOUND.set((*_BOUND.get(), layer.path))
    try:
      return call(layer)
    finally:
      _BOUND.reset(token)

  def replaced(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": {**variables["params"], **own}}

  return nn.map_variables(run, "params", trans_in_fn=replaced)(layer)


def is_own_call(layer: nn.Module) -> bool:
  """Whether an intercepted call is inside `own_call`, or what `bound_call`
  runs."""
  return _OWN.get() or layer.path in _BOUND.get()


def reads(function: Callable[..., Any], tree: Any, *given: Any) -> Any:
  """Of every array in a tree, whether function(tree, *given) depends on it.

  The answer is False for every array of a program with a loop of unknown
  length, which does not tell.
  """
  arrays, structure = jax.tree.flatten(tree)
  program = jax.make_jaxpr(function)(tree, *given)
  _, used = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
  found = used[: len(arrays)]
  if any(found) and "while[" in str(program):
    found = [False] * len(found)
  return jax.tree.unflatten(structure, found)
