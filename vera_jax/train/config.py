"""Settings that can't work are refused before anything is loaded."""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vera_jax.adapters.labels import TRAINED
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
  """Raises a UserError that names what is unset or out of its range."""
  if config.method not in TRAINED:
    raise UserError(
      f"config.method is {config.method!r}; choose from {', '.join(TRAINED)}."
    )
  values = flatten_dict(config.to_dict(), sep=".")
  needed = ["task", "optim.epochs"]
  for rate, own in (("adapter_lr", "lr"), ("head_lr", "head_lr")):
    if config.optim[rate] is None and own in config[config.method]:
      needed.append(f"{config.method}.{own}")
  unset = [f"config.{name}" for name in needed if values[name] is None]
  if unset:
    raise UserError(f"Without a value are: {', '.join(unset)}.")
  for name in AT_LEAST_ONE:
    if values[name] is not None and values[name] < 1:
      raise UserError(f"config.{name} is {values[name]}; at least 1 is needed.")
