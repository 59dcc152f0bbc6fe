"""Which runs a sweep has, where each stands, and which train together."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.sweep.estimate import flops
from vera_jax.sweep.lock import is_held
from vera_jax.train.config import check_settings
from vera_jax.train.group import group_key
from vera_jax.train.workdir import bound

DONE, FAILED, RUNNING, UNFINISHED, NEW = (
  "done",
  "failed",
  "running",
  "unfinished",
  "new",
)
STATES = (DONE, FAILED, RUNNING, UNFINISHED, NEW)
ABOUT = "sweep.json"
LONGEST = 24  # letters of a value in a folder's name


class Planned(NamedTuple):
  """A run of a sweep: `own` is what the sweep overrides, by flat key."""

  name: str
  config: ConfigDict
  own: dict[str, Any]
  folder: Path
  lock: Path

  @property
  def state(self) -> str:
    """One of `STATES`, by what the folder holds now."""
    if (self.folder / results.FILE).exists():
      return DONE
    if is_held(self.lock):
      return RUNNING
    if (self.folder / results.FAILED).exists():
      return FAILED
    return UNFINISHED if (self.folder / "config.json").exists() else NEW

  def failure(self) -> str:
    """Why it failed."""
    failed = results.read(self.folder, results.FAILED) or {}
    return str(failed.get("failed", "no reason is known"))


class Plan(NamedTuple):
  """A whole sweep; `axes` are the keys that differ between its runs."""

  title: str
  paper: str
  folder: Path
  axes: tuple[str, ...]
  runs: list[Planned]


Unit = list[Planned]  # runs that one worker trains together


def make_plan(
  sweep: ConfigDict, workdir: str | Path, *, fixed: Collection[str] = ()
) -> Plan:
  """The runs of a sweep's config, each once.

  Args:
    sweep: title, paper, base, overrides; as `configs/sweeps` make it.
    workdir: the sweep's folder.
    fixed: flat keys of the base that no override may change: those that the
      command line sets.

  Raises:
    UserError: an override with an unknown key or a value of a wrong type, or
      settings that can't work.
  """
  folder = Path(workdir).expanduser().absolute()
  overrides = [
    {key: x for key, x in one if key not in fixed} for one in sweep.overrides
  ]
  axes = _axes(overrides)
  runs: dict[str, Planned] = {}
  for own in overrides:
    config = _overridden(sweep.base, own)
    name = f"{_slug(own, axes)}-{_digest(config)}".strip("-")
    place = folder / "runs" / name
    run = Planned(name, config, own, place, folder / "locks" / name)
    runs.setdefault(_digest(config), run)
  return Plan(sweep.title, sweep.paper, folder, axes, list(runs.values()))


def _axes(overrides: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  """Keys that not all overrides have the same of, in order of appearance."""
  keys = dict.fromkeys(key for own in overrides for key in own)

  def values(key: str) -> set[str]:
    return {repr(own.get(key)) for own in overrides}

  return tuple(key for key in keys if len(values(key)) > 1)


def _overridden(base: ConfigDict, own: Mapping[str, Any]) -> ConfigDict:
  config = base.copy_and_resolve_references()
  for key, value in own.items():
    try:
      _check_key(config, key)
      config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      reason = str(error).strip("'\"").splitlines()[0]
      raise UserError(
        f"The sweep's override {key}={value!r} doesn't fit the base config:"
        f" {reason}"
      ) from error
  check_settings(config)
  return config


def _check_key(config: ConfigDict, key: str) -> None:
  """A KeyError for a key that is not there; updating would pass over it."""
  group: Any = config
  for name in key.split("."):
    if not isinstance(group, ConfigDict) or name not in group:
      raise KeyError(f"it has no such setting as {name!r}")
    group = dict(group.items(preserve_field_references=True))[name]


def _digest(config: ConfigDict) -> str:
  text = json.dumps(bound(config.to_dict()), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _slug(own: Mapping[str, Any], axes: Iterable[str]) -> str:
  """What a run has its own, as a folder's name: sst2-vera-rank16-seed0."""
  parts = []
  for key in axes:
    if own.get(key) is None:
      continue
    word = "" if key in ("task", "method") else key.rpartition(".")[-1]
    value = own[key]
    text = "+".join(value) if isinstance(value, Sequence | tuple) else value
    if isinstance(value, str):
      text = value
    parts.append(word + re.sub(r"[^\w.+-]+", "_", str(text))[:LONGEST])
  return "-".join(parts)


def units(
  runs: Sequence[Planned], *, members: int, shards: int = 1
) -> list[Unit]:
  """Runs that can train together, as they are shared out.

  What is done makes no difference, so that every shard finds the same units.

  Args:
    runs: of the whole plan.
    members: at most so many in a unit.
    shards: there are as many units at least, if there are as many runs.
  """
  groups: dict[str, Unit] = {}
  for run in runs:
    groups.setdefault(group_key(run.config), []).append(run)
  found = [unit for group in groups.values() for unit in _cut(group, members)]
  while len(found) < min(shards, len(runs)):
    longest = max(found, key=len)
    place = found.index(longest)
    found[place : place + 1] = _cut(longest, -(-len(longest) // 2))
  return found


def _cut(group: Unit, members: int) -> list[Unit]:
  """Parts of nearly equal size."""
  count = -(-len(group) // members)
  sizes = [len(group) // count + (i < len(group) % count) for i in range(count)]
  starts = [sum(sizes[:i]) for i in range(count)]
  return [group[a : a + n] for a, n in zip(starts, sizes, strict=True)]


def shard_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
  """The units of one shard, the costliest shared out first."""
  loads = [0.0] * count
  mine = []
  order = sorted(units, key=lambda unit: -_cost(unit))  # stable
  for unit in order:
    least = loads.index(min(loads))
    loads[least] += _cost(unit)
    if least == index:
      mine.append(unit)
  return [unit for unit in units if unit in mine]


def _cost(unit: Unit) -> float:
  return sum(flops(run.config) for run in unit)


def parse_shard(text: str | None) -> tuple[int, int]:
  """(i, n) of "i/n", i from 0; (0, 1) where there is none."""
  if not text:
    return 0, 1
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if match and int(match[1]) < int(match[2]):
    return int(match[1]), int(match[2])
  raise UserError(
    f"--shard={text}: give i/n with i from 0 to n - 1, as in --shard=0/4 to"
    " --shard=3/4 for four machines."
  )


def write_about(plan: Plan) -> None:
  """sweep.json, for the report: title, axes and what each run has its own."""
  about = {
    "title": plan.title,
    "paper": plan.paper,
    "axes": plan.axes,
    "runs": {run.name: run.own for run in plan.runs},
  }
  text = json.dumps(about, indent=2) + "\n"
  try:
    plan.folder.mkdir(parents=True, exist_ok=True)
    # under a name of its own, for shards write at the same time
    new = plan.folder / f".{ABOUT}-{uuid.uuid4().hex}"
    new.write_text(text, encoding="utf-8")
    os.replace(new, plan.folder / ABOUT)
  except OSError as error:
    raise UserError(
      f"{plan.folder} can't be used: {error.strerror}."
    ) from error
