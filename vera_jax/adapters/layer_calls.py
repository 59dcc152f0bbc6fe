"""A layer's call: seen as one product, and its own code on other weights."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.adapters.interface import EMPTY, Matrix, Path, View

Params = Mapping[str, Any]  # a layer's own parameters
# A flag of the model's own scope, which all scopes below it have as well, those
# of `nn.scan` and other transformations among them.
IN_MODEL = "vera_jax"
MARK = "vera_jax: "
# Primitives whose results are their operands.
HANDED_ON = (
  "copy",
  "copy_p",
  "name",
  "optimization_barrier",
  "reshard",
  "sharding_constraint",
)


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


def is_apart(layer: nn.Module) -> bool:
  """Whether a bound layer is none of the model's, which has applied it unbound,
  to values of its own choice. By its path it may be one."""
  return layer.scope is None or not layer.scope.get_flag(IN_MODEL, False)


def remembered(function: Any, call: Any, *key: Any) -> Any:
  """function(structure, leaves, *key) of what a call is given, by its shapes.

  The function is one of `lru_cache`. With a key that can't be hashed, such as a
  module that has a list for a field, it is computed each time.
  """
  leaves, structure = jax.tree.flatten(call)
  inputs = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
    for x in leaves
  )
  try:
    hash((inputs, key))
  except TypeError:
    function = function.__wrapped__
  return function(structure, inputs, *key)


def reads(program: ClosedJaxpr, tree: Any) -> Any:
  """Of every array in a tree, whether the program's results depend on it.

  The answer is False for every array of a program with a loop of unknown
  length, which does not tell.

  Args:
    program: of a function of the tree and, behind it, of other arguments.
    tree: of arrays or shapes.
  """
  arrays, structure = jax.tree.flatten(tree)
  _, used = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
  found = used[: len(arrays)]
  if any(found) and "while[" in str(program):
    found = [False] * len(found)
  return jax.tree.unflatten(structure, found)


def mark(x: Array, name: str) -> None:
  """Marks an array in the program that is being traced, for `changed`."""
  checkpoint_name(x, MARK + name)


def changed(program: ClosedJaxpr, names: Sequence[str]) -> set[str]:
  """The names of marked arrays that are not the program's inputs of that name.

  A layer's parameter may be another value than the model's: `nn.WeightNorm`,
  `nn.SpectralNorm` and `nn.map_variables` change it on its way. So it is
  followed from the program's input to the mark, through whatever hands it on:
  slices of a stack that a loop takes, inner programs, other types, shardings.

  Args:
    program: with what `mark` left in it.
    names: of its first inputs.
  """
  wrong: set[str] = set()

  def follow(program: Jaxpr, names: Sequence[str | None]) -> list[str | None]:
    """The names of what the program returns."""
    known = dict(zip(program.invars, names, strict=False))

    def names_of(variables: Sequence[Any]) -> list[str | None]:
      return [
        None if isinstance(v, Literal) else known.get(v) for v in variables
      ]

    for equation in program.eqns:
      primitive, params = equation.primitive.name, equation.params
      operands = names_of(equation.invars)
      if primitive in HANDED_ON or _rounds_little(equation):
        known.update(zip(equation.outvars, operands, strict=True))
      if primitive == "name" and params["name"].startswith(MARK):
        wrong.update({params["name"].removeprefix(MARK)} - set(operands))
      # A loop's state is another one in each round. Before the arguments of an
      # inner program lie others, such as the number of a branch.
      if primitive == "scan":
        first, carried = params["num_consts"], params["num_carry"]
        operands[first : first + carried] = [None] * carried
      elif primitive == "while":
        last = len(operands) - len(equation.outvars)
        operands[last:] = [None] * len(equation.outvars)
      for inner in _inner_programs(params):
        returned = follow(inner, operands[-len(inner.invars) :])
        if primitive not in ("scan", "while", "cond"):
          known.update(zip(equation.outvars, returned, strict=False))
    return names_of(program.outvars)

  follow(program.jaxpr, names)
  return wrong


def _rounds_little(equation: Any) -> bool:
  """Whether an equation makes numbers of another type, of two bytes or more."""
  if equation.primitive.name != "convert_element_type":
    return False
  new = equation.params["new_dtype"]
  return jnp.issubdtype(new, jnp.floating) and new.itemsize > 1


def _inner_programs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
  for value in params.values():
    for inner in value if isinstance(value, tuple | list) else (value,):
      if isinstance(inner, ClosedJaxpr):
        yield inner.jaxpr
      elif isinstance(inner, Jaxpr):
        yield inner
