"""What a program says of a model: which arrays it reads, and which it changes.

A program is what `jax.make_jaxpr` gives: shapes and equations, no values.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

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
  read = used[: len(arrays)]
  if _loops(program.jaxpr):
    read = [False] * len(read)
  return jax.tree.unflatten(structure, read)


def _loops(program: Jaxpr) -> bool:
  """Whether there is a loop of unknown length in a program."""
  return any(
    equation.primitive.name == "while"
    or any(_loops(inner) for inner in _inner_programs(equation.params))
    for equation in program.eqns
  )


def is_same(first: Jaxpr, second: Jaxpr) -> bool:
  """Whether two programs do the same: the same equations one after another, on
  the same operands. Variables' names don't count, nor how precisely products
  are added up."""
  partner = dict(zip(first.invars, second.invars, strict=False))

  def agree(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(
      a.aval == b.aval
      and (
        isinstance(b, Literal) and bool(a.val == b.val)
        if isinstance(a, Literal)
        else partner.get(a) is b
      )
      for a, b in zip(ours, theirs, strict=True)
    )

  if [x.aval for x in first.invars] != [x.aval for x in second.invars]:
    return False
  if len(first.eqns) != len(second.eqns):
    return False
  for ours, theirs in zip(first.eqns, second.eqns, strict=True):
    inner = [list(_inner_programs(x.params)) for x in (ours, theirs)]
    if (
      ours.primitive is not theirs.primitive
      or not agree(ours.invars, theirs.invars)
      or len(inner[0]) != len(inner[1])
      or not all(map(is_same, *inner))
      or _without_programs(ours.params) != _without_programs(theirs.params)
    ):
      return False
    partner.update(zip(ours.outvars, theirs.outvars, strict=True))
  return agree(first.outvars, second.outvars)


def _without_programs(params: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: value
    for name, value in params.items()
    if name not in ("precision", "preferred_element_type")
    and not list(_inner_programs({name: value}))
  }


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
