"""A method by its name, and its adapter from its settings.

`table.py` has the methods; a new one is a file and its entry there. Configs and
adapter files hold its settings by name. Several methods joined by "+" are a
chain, as "vera+bitfit"; its settings are those of its methods, each under the
method's name.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vera_jax.adapters.method import Method, are_texts
from vera_jax.adapters.table import METHODS as METHODS
from vera_jax.errors import UserError
from vera_jax.patterns import find

if TYPE_CHECKING:  # arrays are not needed to know what a method is called
  from vera_jax.adapters.interface import Adapter


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


def check_key(config: ConfigDict, key: str) -> None:
  """Refuse a key, as "vera.rank", that the config doesn't have.

  Raises:
    UserError: naming the key's group and what that holds.
  """
  place = "config"
  group: Any = config
  for name in key.split("."):
    if not isinstance(group, ConfigDict):
      raise UserError(f"{place} is a setting, not a group of settings.")
    if name not in group:
      near = [f"config.{x}" for x in near_keys(config, key)]
      hint = f" Is it {' or '.join(near)}?" if near else ""
      raise UserError(
        f"{place} has no setting {name!r}.{hint} {place} has: "
        f"{', '.join(group)}."
      )
    place = f"{place}.{name}"
    # as references, since reading a required setting without a value raises
    group = dict(group.items(preserve_field_references=True))[name]


def near_keys(config: ConfigDict, key: str) -> list[str]:
  """The settings that a mistaken key may mean: those that end with it, or whose
  last word is its last word or like it. Of methods, those of the config's."""
  method = config.get("method") or config.get("base", {}).get("method")
  others = {line.group for line in METHODS.values()}
  others -= {*groups_of(str(method)).values()}
  keys: dict[str, list[str]] = {}  # by their last words

  def walk(group: ConfigDict, above: str) -> None:
    for name, value in group.items(preserve_field_references=True):
      if isinstance(value, ConfigDict):
        if name not in others:
          walk(value, f"{above}{name}.")
      else:
        keys.setdefault(name, []).append(above + name)

  walk(config, "")
  last = key.rpartition(".")[2].replace("learning_rate", "lr")
  same = keys.get(last, [])
  if ends := [x for x in same if f".{x}".endswith(f".{key}")]:
    return ends
  near = [last] if same else difflib.get_close_matches(last, keys, n=2)
  return [x for name in near for x in keys[name]][:3]


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


def adapter_named(name: str) -> "Adapter":
  """The method with its default settings: enough to tell whose a leaf is."""
  from vera_jax.adapters.chain import chain

  made = [line() for line in links_of(name).values()]
  return chain(*made) if len(made) > 1 else made[0]


def make_adapter(
  method: str, settings: Mapping[str, Any]
) -> tuple["Adapter", tuple[str, ...]]:
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
    from vera_jax.adapters.chain import chain

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
