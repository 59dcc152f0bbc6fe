"""Which runs can train together, and what tells the members of a group apart.

Members share the base, the projections, the data and every shape. What the step
takes as an argument, and what leaves start from, each may have its own.
"""

import json
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vera_jax.errors import UserError


def _own_keys(config: ConfigDict) -> set[str]:
  keys = {"seed", f"{config.method}.lr", f"{config.method}.head_lr"}
  keys |= {"optim.adapter_lr", "optim.head_lr", "optim.weight_decay"}
  if config.method == "vera" and config.vera.train == "both":
    keys.add("vera.d_init")  # elsewhere the step has it as a constant
  return keys


def _settings(config: ConfigDict, *, own: bool) -> dict[str, Any]:
  """A member's own settings, or those of its whole group, by flat key."""
  keys = _own_keys(config)
  values = flatten_dict(config.to_dict(), sep=".")
  return {
    key: value
    for key, value in values.items()
    if (key in keys) == own and not key.startswith("log.")
  }


def own_settings(config: ConfigDict) -> dict[str, Any]:
  """What tells a member from the others of its group, by flat key."""
  return _settings(config, own=True)


def group_key(config: ConfigDict) -> str:
  """Runs with equal keys can train together, by `train_members`."""
  return json.dumps(_settings(config, own=False), sort_keys=True)


def check_group(configs: Sequence[ConfigDict]) -> None:
  """Refuse configs that can't train together.

  Raises:
    UserError: naming the settings that may not differ but do, or two members
      that would be the same run.
  """
  groups = [_settings(config, own=False) for config in configs]
  differ = sorted(
    {
      k
      for g in groups
      for k in {*g, *groups[0]}
      if g.get(k) != groups[0].get(k)
    }
  )
  if differ:
    raise UserError(
      f"Not the same for all members: {', '.join(differ)}. Runs that train"
      f" together may differ in {', '.join(sorted(_own_keys(configs[0])))}."
    )
  runs = [own_settings(config) for config in configs]
  twice = [run for i, run in enumerate(runs) if run in runs[:i]]
  if twice:
    raise UserError(f"Two members are the same run: {twice[0]}.")


def titles(configs: Sequence[ConfigDict]) -> list[str]:
  """A short name for each member: its seed, or all that differs."""
  runs = [own_settings(config) for config in configs]
  differ = [k for k in runs[0] if any(run[k] != runs[0][k] for run in runs)]
  shown = sorted(differ or ["seed"], key=lambda key: key != "seed")

  def title(run: dict[str, Any]) -> str:
    there = [key for key in shown if run[key] is not None]
    return ", ".join(f"{key.rpartition('.')[-1]} {run[key]}" for key in there)

  return [title(run) for run in runs]
