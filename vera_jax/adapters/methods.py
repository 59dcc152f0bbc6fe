"""The table of methods, and a method's adapter from its settings.

A new method is one file with a function that returns an `Adapter`, and one
line in `METHODS`. Configs and adapter files hold its settings by name. Several
methods joined by "+" are a chain, as "vera+bitfit"; its settings are those of
its methods, each under the method's name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vera_jax.adapters.base_leaves import bitfit, full, head, norms
from vera_jax.adapters.chain import chain
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.lora import lora, lora_fa
from vera_jax.adapters.magnitude import dora, dvora
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.randlora import randlora
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import onelora, vera
from vera_jax.errors import UserError
from vera_jax.patterns import find

# Settings and trained numbers beyond it are a mistake or damage: float32 ends
# near 3e38, and norms square what a product of d, b, A, B and x gives.
LARGEST = 1e9


class Method(NamedTuple):
  """A line of the table.

  Attributes:
    make: settings -> the adapter.
    settings: names and types of what makes an adapter what it is; learning
      rates are no part. A tuple's entries are some of the targets.
    starts: settings -> the names of those that only the first values of leaves
      and matrices come from: trained adapters that differ in them run by one
      program.
    per_run: settings -> the names of those that only leaves' first values come
      from: the runs of an ensemble may each have their own.
    group: the config's group that holds its settings, where that has not its
      own name: a variant of a method takes the method's.
    on_sites: whether it is put on target layers, rather than training leaves of
      the base.
  """

  make: Callable[..., Adapter]
  settings: dict[str, type] = {}
  starts: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
  per_run: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
  group: str | None = None
  on_sites: bool = True


VERA = Method(
  vera,
  {
    "rank": int,
    "d_init": float,
    "init": str,
    "projection_seed": int,
    "train": str,
    "sharing": str,
    "conv": str,
  },
  # where b is trained alone, d stays at d_init, a constant of the program
  starts=lambda given: (
    ("init", "projection_seed")
    if given["train"] == "b"
    else ("d_init", "init", "projection_seed")
  ),
  per_run=lambda given: ("d_init",) if given["train"] == "both" else (),
)
LORA = Method(
  lora,
  {"rank": int, "alpha": float, "scaling": str},
)

METHODS: dict[str, Method] = {
  "vera": VERA,
  "lora": LORA,
  "ia3": Method(ia3, {"feedforward": tuple}),
  "dora": LORA._replace(make=dora, group="lora"),
  "dvora": VERA._replace(make=dvora, group="vera"),
  "lora_fa": Method(
    lora_fa,
    {**LORA.settings, "projection_seed": int},
    starts=lambda given: ("projection_seed",),
  ),
  "onelora": Method(onelora),
  "pvera": Method(
    pvera,
    {"rank": int, "d_init": float, "init": str, "projection_seed": int},
    starts=lambda given: ("d_init", "init", "projection_seed"),
    per_run=lambda given: ("d_init",),
  ),
  "randlora": Method(
    randlora,
    {"rank": int, "alpha": float, "init": str, "projection_seed": int},
    starts=lambda given: ("init", "projection_seed"),
  ),
  "unilora": Method(
    unilora,
    {"rank": int, "size": int, "theta_init": float, "projection_seed": int},
    starts=lambda given: ("theta_init", "projection_seed"),
    per_run=lambda given: ("theta_init",),
  ),
  "bitfit": Method(bitfit, {"biases": str}, on_sites=False),
  "norms": Method(norms, on_sites=False),
  "head": Method(head, on_sites=False),
  "full": Method(full, on_sites=False),
}


def links_of(method: str) -> dict[str, Method]:
  """The lines of `METHODS` that a name stands for, of a chain one per link.

  Raises:
    UserError: a name that is not there, or is there twice.
  """
  names = method.split("+")
  for name in names:
    if name not in METHODS:
      raise UserError(
        f"method is {method!r}; choose from {', '.join(METHODS)}, or join some"
        " of them: vera+bitfit."
      )
  if len(set(names)) < len(names):
    raise UserError(f"method is {method!r}; each method can be there once.")
  return {name: METHODS[name] for name in names}


def groups_of(method: str) -> dict[str, str]:
  """The config's group of settings of each of a method's links, by its name.

  A method that is not in the table, as in older results, is its own group.
  """
  lines = {name: METHODS.get(name) for name in method.split("+")}
  return {name: (line and line.group) or name for name, line in lines.items()}


def settings_in(config: Any, method: str) -> dict[str, Any]:
  """A method's settings in a config, as `make_adapter` takes them.

  Args:
    config: a run's `ConfigDict`, or the dict that result.json has of it.
    method: a name in `METHODS`, or a chain of some.

  Raises:
    UserError: an unknown method, or one that the config has no settings for.
  """
  links_of(method)
  found = {}
  for name, group in groups_of(method).items():
    if group not in config:
      raise UserError(
        f"The config has no group {group!r}, from which {name} takes its"
        " settings."
      )
    found[name] = dict(config[group])
  return found if len(found) > 1 else found[method]


def by_link(
  method: str, settings: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
  """The settings of each of a method's links, by its name.

  Raises:
    UserError: a chain's settings lack those of a link.
  """
  links = links_of(method)
  if len(links) == 1:
    settings = {method: settings}
  for name in links:
    if not isinstance(settings.get(name), Mapping):
      raise UserError(f"The settings of {method} have none for {name}.")
  return {name: settings[name] for name in links}


def adapter_named(name: str) -> Adapter:
  """The method with its default settings: enough to tell whose a leaf is."""
  made = [line.make() for line in links_of(name).values()]
  return chain(*made) if len(made) > 1 else made[0]


def make_adapter(
  method: str, settings: Mapping[str, Any]
) -> tuple[Adapter, tuple[str, ...]]:
  """The method's adapter and the patterns of its targets.

  Args:
    method: a name in `METHODS`, or a chain of some, each of which is then on
      its own targets.
    settings: from `settings_in`; what else they hold is ignored.

  Raises:
    UserError: an unknown method, a chain that has no meaning, or a setting that
      is missing or of a wrong type or value.
  """
  groups = by_link(method, settings)
  if len(groups) > 1:
    made = [make_adapter(name, group) for name, group in groups.items()]
    all_targets = dict.fromkeys(x for _, patterns in made for x in patterns)
    return (
      chain(*(one._replace(on=patterns) for one, patterns in made)),
      tuple(all_targets),
    )
  line = METHODS[method]
  types, settings = line.settings, groups[method]
  wrong = [name for name in types if not _fits(settings.get(name), types[name])]
  # what trains leaves of the base needs no targets
  targets = settings.get("targets") if line.on_sites else ()
  if line.on_sites and (
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
    find(pattern, "")  # refuses what is no regular expression
  chosen = {name: settings[name] for name in types}
  for name, patterns in chosen.items():
    if types[name] is tuple and not set(patterns) <= set(targets or ()):
      raise UserError(
        f"The settings of {method} have {name}={patterns!r}; they must be some"
        f" of the targets, {targets!r}."
      )
  return line.make(**chosen), tuple(targets or ())


def _fits(value: Any, kind: type) -> bool:
  if kind is tuple:
    listed = isinstance(value, tuple | list)
    return listed and all(isinstance(entry, str) for entry in value)
  allowed = (int, float) if kind is float else kind
  if not isinstance(value, allowed) or isinstance(value, bool):
    return False
  if isinstance(value, int | float):  # NaN is not within a limit either
    return abs(value) <= (2**32 - 1 if kind is int else LARGEST)
  return True
