"""The table of methods, and a method's adapter from its settings.

A new method is one file with a function that returns an `Adapter`, and one
line in `METHODS`. Configs and adapter files hold its settings by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vera_jax.adapters.base_leaves import bitfit, full, head
from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

# Settings and trained numbers beyond it are a mistake or damage: float32 ends
# near 3e38, and norms square what a product of d, b, A, B and x gives.
LARGEST = 1e9


class Method(NamedTuple):
  """A line of the table.

  Attributes:
    make: settings -> the adapter.
    settings: names and types of what makes an adapter what it is; learning
      rates are no part.
    starts: settings -> the names of those that only the first values of leaves
      and matrices come from: trained adapters that differ in them run by one
      program.
    per_run: settings -> the names of those that only leaves' first values come
      from: the runs of an ensemble may each have their own.
  """

  make: Callable[..., Adapter]
  settings: dict[str, type] = {}
  starts: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
  per_run: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()


METHODS: dict[str, Method] = {
  "vera": Method(
    vera,
    {
      "rank": int,
      "d_init": float,
      "init": str,
      "projection_seed": int,
      "train": str,
      "sharing": str,
    },
    # where b is trained alone, d stays at d_init, a constant of the program
    starts=lambda given: (
      ("init", "projection_seed")
      if given["train"] == "b"
      else ("d_init", "init", "projection_seed")
    ),
    per_run=lambda given: ("d_init",) if given["train"] == "both" else (),
  ),
  "lora": Method(lora, {"rank": int, "alpha": float}),
  "bitfit": Method(bitfit),
  "head": Method(head),
  "full": Method(full),
}


def method_named(name: str) -> Method:
  """A line of `METHODS`; a UserError for a name that is not there."""
  if name not in METHODS:
    raise UserError(f"method is {name!r}; choose from {', '.join(METHODS)}.")
  return METHODS[name]


def adapter_named(name: str) -> Adapter:
  """The method with its default settings: enough to tell whose a leaf is."""
  return method_named(name).make()


def make_adapter(
  method: str, settings: Mapping[str, Any]
) -> tuple[Adapter, tuple[str, ...]]:
  """The method's adapter and the patterns of its targets.

  Args:
    method: a name in `METHODS`.
    settings: the method's group of a config; what else it holds is ignored.

  Raises:
    UserError: an unknown method, or a setting that is missing or of a wrong
      type or value.
  """
  types = method_named(method).settings
  if not types:  # it trains leaves of the base and needs no targets
    return METHODS[method].make(), ()
  wrong = [name for name in types if not _fits(settings.get(name), types[name])]
  targets = settings.get("targets")
  if (
    not isinstance(targets, Sequence)
    or isinstance(targets, str)
    or not targets
    or not all(isinstance(pattern, str) for pattern in targets)
  ):
    wrong.append("targets")
  if wrong:
    given = ", ".join(f"{name}={settings.get(name)!r}" for name in wrong)
    raise UserError(f"The settings of {method} have no usable {given}.")
  for pattern in targets or ():
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"The target {pattern!r} is no regular expression: {error}."
      ) from error
  chosen = {name: settings[name] for name in types}
  return METHODS[method].make(**chosen), tuple(targets or ())


def _fits(value: Any, kind: type) -> bool:
  allowed = (int, float) if kind is float else kind
  if not isinstance(value, allowed) or isinstance(value, bool):
    return False
  if isinstance(value, int | float):  # NaN is not within a limit either
    return abs(value) <= (2**32 - 1 if kind is int else LARGEST)
  return True
