"""Several runs trained in one program, on one base.

What is trained, the optimiser's slots and numbers, the dropout keys and the
batches have a leading axis, one entry per run; the base and the projections
have none. Each run is the one that `train_and_evaluate` makes of its config, to
float rounding, and leaves the same folder, with its own early stop and result.

The runs save at the same steps, each in its own folder, and the same call goes
on from where all stand. A run that has ended keeps its slot: it is computed and
ignored, so that the others' program, and their bits, stay the same.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vera_jax.adapters.methods import groups_of, links_of
from vera_jax.adapters.plans import AUTO
from vera_jax.data.data import MeasureBatch
from vera_jax.errors import UserError
from vera_jax.pretrained.sharding import RUNS, behind_runs
from vera_jax.train.clock import Clock
from vera_jax.train.config import check_settings
from vera_jax.train.loop import carry_out
from vera_jax.train.preemption import Stop
from vera_jax.train.run import Run
from vera_jax.train.step import State, Tree
from vera_jax.train.trainable import Report

Result = TypeVar("Result")


def train_ensemble(
  configs: Sequence[ConfigDict], workdirs: Sequence[str | Path]
) -> list[dict[str, Any]]:
  """Train several runs at once, each in a folder of its own.

  Args:
    configs: equal but for seed, learning rates, weight decay and what only the
      leaves' first values depend on; `group_key` tells which runs fit together.
    workdirs: the folder of each.

  Returns:
    For each the contents of its result.json, or of its failed.json where a loss
    was not finite: that has the reason under "failed".

  Raises:
    UserError: for whatever the user can mend; the message says how.
    Interrupted: after Ctrl-C or SIGTERM, once all runs are saved.
  """
  for config in configs:
    check_settings(config)
  _check_group(configs)
  titles = _titles(configs)
  runs = [
    Run(config, folder, title=title)
    for config, folder, title in zip(configs, workdirs, titles, strict=True)
  ]
  if len({run.folder for run in runs}) < len(runs):
    raise UserError("Each run of an ensemble needs a workdir of its own.")
  left = [run for run in runs if not run.is_done and run.failure is None]
  begun = {run.config.model.scan for run in left} - {AUTO}
  if len(begun) > 1:
    raise UserError(
      "Some of these runs have begun with stacked layers, others with looped"
      " ones (model.scan in their config.json): train them in two calls."
    )
  for run in left:
    run.choose_scan(*(begun or {AUTO}))
  if left:
    carry_out(left, lambda: _ensembles(left, runs), together=len(runs))
  outcomes = [run.result or run.failure for run in runs]
  return [outcome for outcome in outcomes if outcome is not None]


def _ensembles(
  left: Sequence[Run], runs: Sequence[Run]
) -> Iterator["Ensemble"]:
  """The runs that are left, in groups that can train on together.

  These stand at the same step; to meet others a run goes back by one save and
  no further, which is how far apart runs are that were killed between two
  saves.
  """
  waiting = [run for run in left if not run.has_ended]
  while waiting:
    step = min(run.saves.resumable[-1] for run in waiting)
    live = [run for run in waiting if step in run.saves.resumable]
    slots = live
    if step:  # the slots that were saved, for another program has other bits
      by_name = {_name(run.config): run for run in runs}
      saved = [run.saves.progress(step).get("ensemble") for run in live]
      names = saved[0] or []
      # a run that went on alone, or with others than these, has other slots
      alike = all(each == names for each in saved)
      if alike and names and by_name.keys() >= set(names):
        slots = [by_name[name] for name in names]
    yield Ensemble(step, live, slots)
    # those that stand elsewhere train after these, from their own saves
    waiting = [run for run in waiting if run not in live]


def _stack(*trees: Tree) -> Tree:
  """Each run's tree as one, whose arrays have an axis of runs."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Ensemble:
  """Several runs in one program: a `Trainable`.

  Attributes:
    live: the runs that train.
    slots: whose leaves are where on the leading axis. The slot of a run that
      has ended, or failed, is computed and ignored.
  """

  def __init__(
    self, first_step: int, live: Sequence[Run], slots: Sequence[Run]
  ) -> None:
    self.first_step, self.live, self.slots = first_step, list(live), slots
    self.setup, self.folder = live[0].setup, live[0].folder
    # as many in each part of the mesh: the first run once more is what idles
    self._parts = parts = self.setup.mesh.shape[RUNS]
    idle = -len(slots) % parts
    self._axis = axis = [*slots, *[slots[0]] * idle]
    self.size = len(axis)
    self.seeds = [run.config.seed for run in axis]
    self.titles = [run.title for run in live]
    stack = jax.jit(
      _stack, out_shardings=NamedSharding(self.setup.mesh, PartitionSpec(RUNS))
    )
    self.key, self.rates = stack(*((run.key, run.rates) for run in axis))

  @property
  def has_ended(self) -> bool:
    """Whether no run trains any more."""
    return all(run.has_ended for run in self.live)

  @property
  def lacks_scores(self) -> bool:
    return any(run.lacks_scores for run in self.live)

  def start(self) -> State:
    """The states of all slots, stacked; idle ones have a copy of another's."""
    states = {run: run.start(self.first_step) for run in self.live}
    for run in self.live:
      run.progress["ensemble"] = [_name(slot.config) for slot in self.slots]
    filler = states[self.live[0]]
    alone = jax.tree.map(lambda leaf: leaf.sharding, self.setup.shape)
    # Each run saves and evaluates in the shardings that a run alone has, so
    # that it may go on alone, and its evaluation is the same program.
    self._take = jax.jit(
      lambda state, slot: jax.tree.map(lambda leaf: leaf[slot], state),
      out_shardings=alone,
    )
    behind = jax.tree.map(behind_runs, alone)
    stack = jax.jit(_stack, out_shardings=behind)
    # The run with a number in its part of the mesh, for all parts: nothing is
    # sent.
    parts = self._parts
    self._take_across = jax.jit(
      lambda params, number: jax.tree.map(
        lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:])[:, number], params
      ),
      out_shardings=behind.params,
    )
    return stack(*(states.get(run, filler) for run in self._axis))

  def _state_of(self, run: Run, state: State) -> State:
    """A run's own part, as a run alone has it."""
    return self._take(state, self.slots.index(run))

  @contextmanager
  def recording(
    self, log: Callable[[str], None], clock: Clock
  ) -> Iterator[None]:
    self._log, self._together = log, len(self.live)
    with ExitStack() as stack:
      for run in self.live:
        stack.enter_context(run.recording(log, clock))
      yield

  def _each(self, act: Callable[[Run], Result]) -> list[Result]:
    """act(run) for every run that trains; one that fails by it is left out."""
    results = []
    for run in list(self.live):
      try:
        results.append(act(run))
      except UserError as error:
        if run.failure is None:  # not a failure of this run alone
          raise
        self.live.remove(run)
        self._log(f"{run.title} failed. {error}")
    return results

  def record(self, step: int, metrics: Mapping[str, Array]) -> float:
    """Each run's own metrics; returns the mean loss."""
    self.live = [run for run in self.live if not run.has_ended]
    columns = {name: np.asarray(values) for name, values in metrics.items()}

    def record_own(run: Run) -> float:
      slot = self.slots.index(run)
      return run.record(step, {name: x[slot] for name, x in columns.items()})

    losses = self._each(record_own)
    return sum(losses) / len(losses) if losses else math.nan

  def evaluate(self, step: int, state: State, stop: Stop) -> None:
    """One run at a time, by the program that a run alone has; where the mesh
    splits them, one in each of its parts."""
    if self._parts == 1:
      self._each(
        lambda run: run.evaluate(step, self._state_of(run, state), stop)
      )
      return

    @cache
    def measures(number: int) -> list[MeasureBatch]:
      params = self._take_across(state.params, number)
      return self.setup.measure_runs_with(params, stop)

    def score(run: Run) -> None:
      part, number = divmod(self.slots.index(run), self.size // self._parts)
      run.score(step, measures(number)[part])

    self._each(score)

  def save(self, step: int, state: State) -> None:
    for run in self.live:
      run.save(step, self._state_of(run, state))

  def report(self) -> Report:
    scores = [run.history[-1]["score"] for run in self.live] or [math.nan]
    shown = (
      f"{len(self.live)} of {self._together} train, {min(scores):.4f} to"
      f" {max(scores):.4f}"
    )
    reports = {run.title: run.report() for run in self.live}
    return Report(
      shown,
      [f"{title}: {x}" for title, each in reports.items() for x in each.lines],
    )


# Which runs fit together: they share the base, the projections, the data and
# every shape. What the step takes as an argument, and what leaves start from,
# each may have its own.


def _own_keys(config: ConfigDict) -> set[str]:
  keys = {"seed", "optim.adapter_lr", "optim.head_lr", "optim.weight_decay"}
  groups = groups_of(config.method)
  for name, line in links_of(config.method).items():
    group = groups[name]
    per_run = line.per_run(line.read(config[group].to_dict()))
    keys |= {f"{group}.{key}" for key in ("lr", "head_lr", *per_run)}
  return keys


def _settings(config: ConfigDict, *, per_run: bool) -> dict[str, Any]:
  keys = _own_keys(config)
  values = flatten_dict(config.to_dict(), sep=".")
  return {
    key: value
    for key, value in values.items()
    if (key in keys) == per_run and not key.startswith("log.")
  }


def group_key(config: ConfigDict) -> str:
  """Runs with equal keys can train together, by `train_ensemble`."""
  return json.dumps(_settings(config, per_run=False), sort_keys=True)


def _name(config: ConfigDict) -> str:
  return json.dumps(_settings(config, per_run=True), sort_keys=True)


def _check_group(configs: Sequence[ConfigDict]) -> None:
  """Refuse configs that can't train together, and the same run twice."""
  shared = [_settings(config, per_run=False) for config in configs]
  differ = sorted(
    {
      key
      for one in shared
      for key in {*one, *shared[0]}
      if one.get(key) != shared[0].get(key)
    }
  )
  if differ:
    raise UserError(
      f"Not the same for all runs: {', '.join(differ)}. Runs that train"
      f" together may differ in {', '.join(sorted(_own_keys(configs[0])))}."
    )
  names = [_name(config) for config in configs]
  twice = [name for i, name in enumerate(names) if name in names[:i]]
  if twice:
    raise UserError(f"Two runs of the ensemble are the same: {twice[0]}.")


def _titles(configs: Sequence[ConfigDict]) -> list[str]:
  """A short name for each run: its seed, and whatever else differs."""
  runs = [_settings(config, per_run=True) for config in configs]
  differ = [k for k in runs[0] if any(run[k] != runs[0][k] for run in runs)]
  shown = sorted(differ or ["seed"], key=lambda key: key != "seed")
  return [
    ", ".join(
      f"{key.rpartition('.')[-1]} {run[key]}"
      for key in shown
      if run[key] is not None
    )
    for run in runs
  ]
