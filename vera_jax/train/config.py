"""Settings that can't work are refused before anything is loaded."""

from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vera_jax.adapters.methods import adapter_named, groups_of, settings_in
from vera_jax.errors import UserError

AT_LEAST_ONE = (
  "optim.epochs",
  "optim.batch_size",
  "optim.pass_rows",
  "optim.patience",
  "eval_batch_size",
  "log.every",
  "data.max_length",
)


def check_settings(config: ConfigDict) -> None:
  """Refuse a run's settings that are unset or out of their range.

  Raises:
    UserError: names all of them, with what is allowed.
  """
  try:  # all else depends on it
    adapter_named(config.method)
    settings_in(config, config.method)
  except UserError as error:
    raise UserError(f"config.{error}") from error
  group = next(iter(groups_of(config.method).values()))
  values = flatten_dict(config.to_dict(), sep=".")
  needed = ["task", "optim.epochs"]
  for rate, own in (("adapter_lr", "lr"), ("head_lr", "head_lr")):
    if config.optim[rate] is None and own in config[group]:
      needed.append(f"{group}.{own}")
  unset = [f"config.{name}" for name in needed if values[name] is None]
  wrong = [f"Without a value are: {', '.join(unset)}."] if unset else []
  for name in AT_LEAST_ONE:
    if values[name] is not None and values[name] < 1:
      wrong.append(f"config.{name} is {values[name]}; at least 1 is needed.")
  if wrong:
    raise UserError("\n".join(wrong))


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
      raise UserError(
        f"{place} has no setting {name!r}. It has: {', '.join(group)}."
      )
    place = f"{place}.{name}"
    # as references, since reading a required setting without a value raises
    group = dict(group.items(preserve_field_references=True))[name]
