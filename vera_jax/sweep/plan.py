"""Which runs a sweep has, where each stands, and which train together."""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.methods import check_key
from vera_jax.errors import UserError
from vera_jax.files import write_json
from vera_jax.locks import is_locked
from vera_jax.places import place
from vera_jax.pretrained.sharding import AXES, Together, mesh_sizes
from vera_jax.sweep.estimate import flops
from vera_jax.train.config import check_settings
from vera_jax.train.ensemble import group_key
from vera_jax.train.workdir import identity_code

STATES = ("done", "failed", "running", "unfinished", "new")
DONE, FAILED, RUNNING, UNFINISHED, NEW = STATES
LONGEST = 24  # letters of a value in a folder's name


class SweepRun(NamedTuple):
  """A run of a sweep.

  Attributes:
    name: of its folder; it ends in a digest of the settings.
    config: its settings.
    overrides: those that the sweep sets, by flat key.
    folder: the run's workdir.
    lock: the file that a process has while it trains the run.
  """

  name: str
  config: ConfigDict
  overrides: dict[str, Any]
  folder: Path
  lock: Path

  @property
  def state(self) -> str:
    """One of `STATES`, by what the folder holds now."""
    if (self.folder / results.FILE).exists():
      return DONE
    if is_locked(self.lock):
      return RUNNING
    if (self.folder / results.FAILED).exists():
      return FAILED
    return UNFINISHED if (self.folder / "config.json").exists() else NEW

  def failure(self) -> str:
    """Why it failed."""
    failed = results.read(self.folder, results.FAILED) or {}
    return str(failed.get("failed", "no reason is known"))


NEEDED = ("title", "paper", "base", "overrides", "members")


class Plan(NamedTuple):
  """A whole sweep; `axes` are the keys that differ between its runs."""

  title: str
  paper: str
  folder: Path
  axes: tuple[str, ...]
  runs: list[SweepRun]


Unit = list[SweepRun]  # runs that one worker trains together


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
  folder = place(workdir)
  if lacking := [name for name in NEEDED if name not in sweep]:
    raise UserError(
      f"The sweep's config lacks {', '.join(lacking)}; it is made as those of"
      " configs/sweeps/ are."
    )
  try:
    all_overrides = [
      {key: x for key, x in one if key not in fixed} for one in sweep.overrides
    ]
  except (TypeError, ValueError) as error:
    raise UserError(
      f"The sweep's overrides are no list of settings ({error}); see"
      " configs/sweeps/rank.py."
    ) from error
  keys = dict.fromkeys(key for one in all_overrides for key in one)
  axes = tuple(
    key for key in keys if len({repr(o.get(key)) for o in all_overrides}) > 1
  )
  runs: dict[str, SweepRun] = {}
  for overrides in all_overrides:
    # with its references, which know the types of settings without a value
    config = copy.deepcopy(sweep.base)
    for key, value in overrides.items():
      try:
        check_key(config, key)  # updating would ignore a key that is unknown
        config.update_from_flattened_dict({key: value})
      except (UserError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip("'\"").splitlines()[0]
        raise UserError(
          f"The sweep's override {key}={value!r} doesn't fit the base config:"
          f" {reason}"
        ) from error
    config = config.copy_and_resolve_references()
    check_settings(config)
    code = identity_code(config.to_dict())
    name = "-".join([*_name_parts(overrides, axes), code])
    workdir, lock = folder / "runs" / name, folder / "locks" / name
    runs.setdefault(code, SweepRun(name, config, overrides, workdir, lock))
  return Plan(sweep.title, sweep.paper, folder, axes, list(runs.values()))


def _name_parts(overrides: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
  """What makes a run differ, for its folder's name: sst2, vera, rank16."""
  parts = []
  for key in axes:
    value = overrides.get(key)
    if value is None:
      continue
    word = "" if key in ("task", "method") else key.rpartition(".")[-1]
    text = "+".join(value) if isinstance(value, tuple | list) else str(value)
    parts.append(word + re.sub(r"[^\w.+-]+", "_", text)[:LONGEST])
  return parts


def make_units(
  runs: Sequence[SweepRun], *, most: int, shards: int = 1
) -> list[Unit]:
  """Divide runs into units whose runs can train together.

  It makes no difference what is done already, so every shard finds the same
  units.

  Args:
    runs: all of the plan's.
    most: runs in a unit.
    shards: there are at least as many units, if there are as many runs.
  """

  def split(group: Unit, most: int) -> list[Unit]:  # into nearly equal parts
    parts = np.array_split(range(len(group)), -(-len(group) // most))
    return [[group[i] for i in part] for part in parts]

  groups: dict[str, Unit] = {}
  for run in runs:
    groups.setdefault(group_key(run.config), []).append(run)
  units = [unit for group in groups.values() for unit in split(group, most)]
  while len(units) < min(shards, len(runs)):
    longest = max(units, key=len)
    place = units.index(longest)
    units[place : place + 1] = split(longest, -(-len(longest) // 2))
  return units


def in_queues(units: Sequence[Unit]) -> list[Unit]:
  """Those whose runs can train together as one, for a single worker.

  It trains as many at once as before; the others wait for one to end, and then
  need no new process, base or program.
  """
  groups: dict[str, Unit] = {}
  for unit in units:
    groups.setdefault(group_key(unit[0].config), []).extend(unit)
  return list(groups.values())


def splits(units: Sequence[Unit], devices: int, *, most: int) -> Iterator[str]:
  """How units lie on so many devices, a line for each kind, for a person.

  Of a unit `most` runs train at once.

  Rows are counted as if no two texts shared one.

  Raises:
    UserError: the config's mesh doesn't fit so many devices.
  """
  kinds: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
  for unit in units:
    config = unit[0].config
    together = Together(min(most, len(unit)), config.optim.batch_size)
    sizes = mesh_sizes(devices, **config.mesh, together=together)
    kinds[*together, sizes] += 1
  for (runs, rows, sizes), count in kinds.items():
    parts, *rest = sizes
    each = -(-runs // parts) * -(-rows // (rest[0] * rest[1]))
    named = ", ".join(
      f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True)
    )
    idle = -runs % parts
    yield (
      f"{count} x {runs} runs together on {devices} devices: {named}; a device"
      f" has {each} of a step's {runs * rows} rows"
      + (f", {idle} parts idle" if idle else "")
    )


def shard_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
  """The units of one of `count` shards: dealt out, the dearest ones first."""
  costs = [sum(flops(run.config) for run in unit) for unit in units]
  order = sorted(range(len(units)), key=lambda number: -costs[number])
  return [units[number] for number in sorted(order[index::count])]


def parse_shard(text: str | None) -> tuple[int, int]:
  """(i, n) of "i/n", i from 0; (0, 1) if there is none."""
  if not text:
    return 0, 1
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if match and int(match[1]) < int(match[2]):
    return int(match[1]), int(match[2])
  raise UserError(
    f"--shard={text}: give i/n with i from 0 to n - 1, as in --shard=0/4 to"
    " --shard=3/4 for four machines."
  )


def write_plan(plan: Plan) -> None:
  """sweep.json, for the report: title, axes and each run's overrides."""
  fields = {
    "title": plan.title,
    "paper": plan.paper,
    "axes": plan.axes,
    "runs": {run.name: run.overrides for run in plan.runs},
  }
  try:
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / "sweep.json", fields)
  except OSError as error:
    raise UserError(
      f"{plan.folder} can't be used: {error.strerror}."
    ) from error
