"""The run-time check of arrays' shapes that tests switch on."""

import inspect
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

checked = beartype(
  conf=BeartypeConf(
    # An int serves where a float is asked for, as type checkers have it (PEP
    # 484).
    is_pep484_tower=True,
    # What `places.place` returns is annotated as Path; a store's is only used
    # as one.
    hint_overrides=FrozenDict({Path: Path | PurePosixPath}),
  )
)
check_everything = jaxtyping.jaxtyped


def names_shapes(hint: Any) -> bool:
  """Whether an annotation has an array's shape somewhere in it."""
  if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
    return True
  return any(map(names_shapes, get_args(hint)))


def check_shapes(*, typechecker: Any) -> Any:
  """Checks functions and classes that name a shape: mypy has the rest."""

  def decorate(function):
    below = getattr(function, "fget", getattr(function, "__func__", function))
    hints = getattr(below, "__annotations__", {})
    if any(map(names_shapes, hints.values())):
      return check_everything(function, typechecker=typechecker)
    return function

  return decorate
