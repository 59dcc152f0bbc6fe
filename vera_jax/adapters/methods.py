"""The table of methods, and a method's adapter from its settings.

A new method is one file that ends with its `Method`, and one line in `FILES`.
Configs and adapter files hold its settings by name. Several methods joined by
"+" are a chain, as "vera+bitfit"; its settings are those of its methods, each
under the method's name.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vera_jax.adapters.chain import chain
from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.method import Method, are_texts
from vera_jax.errors import UserError
from vera_jax.patterns import find

# The file of each method, in the order of tables.
FILES = {
  "vera": "vera",
  "lora": "lora",
  "ia3": "ia3",
  "dora": "magnitude",
  "dvora": "magnitude",
  "pvera": "pvera",
  "onelora": "vera",
  "lora_fa": "lora",
  "randlora": "randlora",
  "unilora": "unilora",
  "lora_xs": "lora_xs",
  "bitfit": "base_leaves",
  "norms": "base_leaves",
  "head": "base_leaves",
  "full": "base_leaves",
}
METHODS: dict[str, Method] = {
  name: getattr(import_module(f"vera_jax.adapters.{file}"), name)
  for name, file in FILES.items()
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
  return {
    name: METHODS[name].group if name in METHODS else name
    for name in method.split("+")
  }


def add_groups(config: ConfigDict) -> None:
  """Put every method's group into a config, with its defaults."""
  for line in METHODS.values():
    if line.group == line.name:
      config[line.name] = ConfigDict(
        {
          name: placeholder(float) if default is None else default
          for name, default, _ in line.described()
        }
      )


def settings_in(config: Any, method: str) -> dict[str, Any]:
  """A method's settings and targets in a config, as `make_adapter` takes them.

  They are what an adapter's file keeps, which the learning rates are not.

  Args:
    config: a run's `ConfigDict`, or the dict that result.json has of it.
    method: a name in `METHODS`, or a chain of some.

  Raises:
    UserError: an unknown method, or one that the config has no settings for.
  """
  links_of(method)
  settings = {}
  for name, group in groups_of(method).items():
    kept = {"targets", *(field.name for field in METHODS[name].fields)}
    if group not in config:
      raise UserError(
        f"The config has no group {group!r}, from which {name} takes its"
        " settings."
      )
    settings[name] = {k: x for k, x in config[group].items() if k in kept}
  return settings if len(settings) > 1 else settings[method]


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
  made = [line() for line in links_of(name).values()]
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
  adapter = line.adapter(groups[method])
  targets: Any = groups[method].get("targets") if line.on_sites else ()
  if line.on_sites and (not targets or not are_texts(targets)):
    raise UserError(
      f"The settings of {method} have no usable targets={targets!r}."
    )
  for pattern in targets:
    find(pattern, "")  # refuses what is no regular expression
  if not set(adapter.apart) <= set(targets):
    raise UserError(
      f"{method} treats the layers {adapter.apart!r} in another way; they must"
      f" be some of the targets, {targets!r}."
    )
  return adapter, tuple(targets)
