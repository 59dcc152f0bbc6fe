"""A run's folder: one config, resumed by the same config, never by another.

config.json  checkpoints/  metrics.jsonl  tensorboard/  adapter/  result.json
and failed.json instead of the last two where a loss was not finite.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vera_jax.errors import UserError
from vera_jax.json_files import read_json

# What may differ between a run and its resumption: it changes no result.
FREE = ("log", "predict_test")


def write_json(path: Path, value: Any) -> None:
  """Write whole or not at all."""
  new = path.with_name(path.name + ".new")
  new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(new, path)


def bound(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that make a run what it is."""
  return {k: v for k, v in config.items() if k not in FREE}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
  # as JSON reads them back: tuples are lists there
  return flatten_dict(json.loads(json.dumps(bound(config))), sep=".")


def check(workdir: Path, config: Mapping[str, Any]) -> None:
  """Refuse a folder that holds a run of another config, or of none.

  Raises:
    UserError: naming each key that differs, with both values, if any.
  """
  path = workdir / "config.json"
  if not path.exists():
    if (workdir / "checkpoints").exists():
      raise UserError(
        f"{workdir} holds checkpoints, but no config.json that says of what"
        " run. Choose another --workdir, or remove them."
      )
    return
  written = read_json(path, hint="Choose another --workdir.")
  ours, theirs = _flat(config), _flat(written)
  differ = [
    f"{key}: {theirs.get(key, 'unset')!r} there, {ours.get(key, 'unset')!r} now"
    for key in sorted({*ours, *theirs})
    if ours.get(key) != theirs.get(key)
  ]
  if differ:
    raise UserError(
      f"{workdir} holds a run of another config. Choose another --workdir, or"
      " the same settings to resume it. Different are:\n  "
      + "\n  ".join(differ)
    )


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
  """Make the folder this config's."""
  check(workdir, config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", dict(config))
  except OSError as error:
    raise UserError(f"{workdir} can't be used: {error.strerror}.") from error
