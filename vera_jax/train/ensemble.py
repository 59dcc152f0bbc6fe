"""Several runs trained in one program, on one base.

What is trained, the optimiser's state and numbers, the dropout keys and the
batches have a leading axis, one entry per slot of the ensemble; the base and
the projections have none. Each run is the one that `train_and_evaluate` makes
of its config, to float rounding, and leaves the same folder, with its own early
stop and result.

A slot has one run after another. At the end of the epoch in which its run has
ended, or failed, the next one that waits takes it and begins at its own step 0.
All have epochs of equal length, so their ends meet. A run saves, logs and is
scheduled by its own steps; the loop counts the program's. A slot that nobody
waits for is computed and ignored, so that the others' program, and their bits,
stay the same.

The runs save at the same time, each in its own folder, and the same call goes
on from where all stood together.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array, lax
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
from vera_jax.train.setup import Setup
from vera_jax.train.step import State, Tree
from vera_jax.train.trainable import Batches, Refilled, Report

Result = TypeVar("Result")


def train_ensemble(
  configs: Sequence[ConfigDict],
  workdirs: Sequence[str | Path],
  *,
  members: int | None = None,
  inputs: Path | None = None,
) -> list[dict[str, Any]]:
  """Train several runs at once, each in a folder of its own.

  Args:
    configs: equal but for seed, learning rates, weight decay and what only the
      leaves' first values depend on; `group_key` tells which runs fit together.
    workdirs: the folder of each.
    members: how many train at once; the others wait, in their order, until one
      ends or fails. None: all.
    inputs: as for `Run`, where they are runs of a sweep.

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
    Run(config, folder, title=title, inputs=inputs)
    for config, folder, title in zip(configs, workdirs, titles, strict=True)
  ]
  if len({run.folder for run in runs}) < len(runs):
    raise UserError("Each run of an ensemble needs a workdir of its own.")
  members = len(runs) if members is None else members
  if members < 1:
    raise UserError(f"members={members}: give 1 or more runs to train at once.")
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
    carry_out(left, partial(_ensembles, left, members), together=members)
  outcomes = [run.result or run.failure for run in runs]
  return [outcome for outcome in outcomes if outcome is not None]


def _ensembles(
  left: Sequence[Run], members: int, setup: Setup
) -> Iterator["Ensemble"]:
  """One for all runs; then for those that can't join it amid an epoch."""
  _go_back(left)
  waiting = [run for run in left if not run.has_ended]
  while waiting:
    ensemble = Ensemble(waiting, setup, members)
    yield ensemble
    waiting = ensemble.waiting


def _go_back(runs: Sequence[Run]) -> None:
  """By one save, where others lack the last one: all save at the same time.

  So far apart are runs that were killed between two of their saves.
  """
  by_name = {_name(run.config): run for run in runs if run.is_open}
  saved = {
    name: {
      step: run.saves.progress(step).get("ensemble")
      for step in run.saves.steps[-2:]
    }
    for name, run in by_name.items()
  }

  def is_whole(name: str, step: int) -> bool:
    ensemble = saved[name].get(step)
    return ensemble is None or all(
      saved[other].get(at) == ensemble
      # one that had ended is computed on, but not saved
      or (by_name[other].has_ended and at > by_name[other].first_step)
      for other, at in ensemble["slots"]
      if other in by_name
    )

  ahead = []
  for name, run in by_name.items():
    before, *last = run.saves.resumable
    if last and not is_whole(name, *last) and is_whole(name, before):
      ahead.append((run, before))
  for run, before in ahead:
    run.go_back(before)


def _stack(*trees: Tree) -> Tree:
  """Each run's tree as one, whose arrays have an axis of runs."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@dataclass
class Slot:
  """A place on the axis of runs.

  Attributes:
    name: of the run that has it, or had it last: what it has its own.
    offset: the program's step at which that run was at its step 0.
    run: the one that has it; None once it has ended or failed.
  """

  name: str
  offset: int
  run: Run | None = None


class Ensemble:
  """Several runs in one program: a `Trainable`.

  Attributes:
    slots: whose leaves are where on the axis of runs. Beyond them the axis may
      have room for more, which a copy of the first one's fills.
    waiting: the runs that have no slot yet, in their order.
    size: the length of the axis.
  """

  def __init__(
    self, waiting: Sequence[Run], setup: Setup, members: int
  ) -> None:
    """Give slots to runs; one of them says how far in its epoch all begin.

    Args:
      waiting: the runs; the first that was saved in an ensemble goes on there.
      setup: what all are made of.
      members: how many train at once, but as many in each part of the mesh.
    """
    self.setup = setup
    self._parts = parts = setup.mesh.shape[RUNS]
    first = next((x for x in waiting if "ensemble" in x.progress), waiting[0])
    saved = first.progress.get("ensemble")
    if saved and len(saved["slots"]) <= members + -members % parts:
      # the slots that were saved, for another program has other bits
      self.first_step, count = saved["step"], len(saved["slots"])
      together = {
        _name(run.config): run
        for run in waiting
        if run.progress.get("ensemble") == saved
      }
      self.slots = [
        Slot(name, self.first_step - step, together.get(name))
        for name, step in saved["slots"]
      ]
    else:
      self.first_step, count = first.first_step, min(members, len(waiting))
      self.slots = []
    self.size = count + -count % parts
    self.waiting = [run for run in waiting if run not in self.live]
    lack_scores = self.lacks_scores or first.lacks_scores
    self._fill(self.first_step, lack_scores=lack_scores)
    self.folder = self.live[0].folder
    self.titles = [run.title for run in self.live]
    self._gather_numbers()

  @property
  def live(self) -> list[Run]:
    """The runs that train."""
    return [slot.run for slot in self.slots if slot.run]

  @property
  def _axis(self) -> list[Slot]:
    return [*self.slots, *[self.slots[0]] * (self.size - len(self.slots))]

  @property
  def steps(self) -> int:
    each, free = self.setup.steps, self.size - len(self.live)
    ends = [slot.offset + each for slot in self.slots if slot.run]
    ends = sorted([self._filled_at] * free + ends)
    for run in self.waiting:
      heapq.heapreplace(ends, ends[0] + each - run.first_step)
    return max(ends)

  @property
  def has_ended(self) -> bool:
    """Whether no run trains any more."""
    return all(run.has_ended for run in self.live)

  @property
  def lacks_scores(self) -> bool:
    return any(run.lacks_scores for run in self.live)

  def _fill(self, step: int, *, lack_scores: bool = False) -> list[int]:
    """Give free slots to runs that wait; returns the slots' numbers.

    A run fits if it is as far in its epoch as the others in theirs, and all of
    them, or none, are still to be evaluated there.
    """
    between, filled = self.setup.steps_between_evaluations, []
    self._filled_at = step
    for number in range(self.size):
      if number < len(self.slots) and self.slots[number].run:
        continue
      fitting = (
        run
        for run in self.waiting
        if (run.first_step - step) % between == 0
        and run.lacks_scores == lack_scores
      )
      if (run := next(fitting, None)) is None:
        break
      self.waiting.remove(run)
      if not run.is_open:
        run.open(self.setup)
      slot = Slot(_name(run.config), step - run.first_step, run)
      self.slots[number : number + 1] = [slot]  # or behind the last one
      filled.append(number)
    return filled

  def _gather_numbers(self) -> None:
    runs = [slot.run or self.live[0] for slot in self._axis]
    split = NamedSharding(self.setup.mesh, PartitionSpec(RUNS))
    stack = jax.jit(_stack, out_shardings=split)
    self.key, self.rates = stack(*((run.key, run.rates) for run in runs))

  def start(self) -> State:
    """The states of all slots, stacked; a free one has a copy of another's."""
    states = {run: run.start() for run in self.live}
    filler = states[self.live[0]]
    alone = jax.tree.map(lambda leaf: leaf.sharding, self.setup.shape)
    # Each run saves and evaluates in the shardings that a run alone has, so
    # that it may go on alone, and its evaluation is the same program.
    self._take = jax.jit(
      lambda state, number: jax.tree.map(lambda leaf: leaf[number], state),
      out_shardings=alone,
    )
    behind = jax.tree.map(behind_runs, alone)
    stack = jax.jit(_stack, out_shardings=behind)
    self._put = jax.jit(
      lambda state, one, number: jax.tree.map(
        lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, number, 0),
        *(state, one),
      ),
      donate_argnums=0,
      out_shardings=behind,
    )
    # The run with a number in its part of the mesh, for all parts: nothing is
    # sent.
    parts = self._parts
    self._take_across = jax.jit(
      lambda params, number: jax.tree.map(
        lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:])[:, number], params
      ),
      out_shardings=behind.params,
    )
    runs = [slot.run for slot in self._axis]
    return stack(*(states[run] if run else filler for run in runs))

  def batches(self, step: int) -> Batches:
    axis = self._axis
    return self.setup.data.train_batches(
      seeds=[json.loads(slot.name)["seed"] for slot in axis],
      start_step=[step - slot.offset for slot in axis],
    )

  @contextmanager
  def recording(
    self, log: Callable[[str], None], clock: Clock
  ) -> Iterator[None]:
    self._log, self._clock = log, clock
    self._files: dict[Run, ExitStack] = {}
    with ExitStack() as self._all_files:
      for run in self.live:
        self._record(run)
      if self.waiting:
        names = "; ".join(run.title for run in self.waiting)
        log(f"{len(self.waiting)} more runs wait for a place: {names}")
      yield

  def _record(self, run: Run) -> None:
    """Open a run's files of metrics."""
    self._files[run] = self._all_files.enter_context(ExitStack())
    self._files[run].enter_context(run.recording(self._log, self._clock))

  def _each(self, act: Callable[[int, Slot, Run], Result]) -> list[Result]:
    """act(number, slot, run) for every run that trains; one that fails by it
    is left out."""
    results = []
    for number, slot in enumerate(self.slots):
      if (run := slot.run) is None:
        continue
      try:
        results.append(act(number, slot, run))
      except UserError as error:
        if run.failure is None:  # not a failure of this run alone
          raise
        self._leave(slot, run)
        self._log(f"{run.title} failed. {error}")
    return results

  def _leave(self, slot: Slot, run: Run) -> None:
    slot.run = None
    self._files.pop(run).close()

  def record(self, step: int, metrics: Mapping[str, Array]) -> float:
    """Each run's own metrics; returns the mean loss."""
    columns = {name: np.asarray(values) for name, values in metrics.items()}
    losses = self._each(
      lambda number, slot, run: run.record(
        step - slot.offset, {name: x[number] for name, x in columns.items()}
      )
    )
    return sum(losses) / len(losses) if losses else math.nan

  def evaluate(self, step: int, state: State, stop: Stop) -> None:
    """One run at a time, by the program that a run alone has; where the mesh
    splits them, one in each of its parts."""
    if self._parts == 1:
      self._each(
        lambda number, slot, run: run.evaluate(
          step - slot.offset, self._take(state, number), stop
        )
      )
      return

    @cache
    def measures(number: int) -> list[MeasureBatch]:
      params = self._take_across(state.params, number)
      return self.setup.measure_runs_with(params, stop)

    def score(number: int, slot: Slot, run: Run) -> None:
      part, within = divmod(number, self.size // self._parts)
      run.score(step - slot.offset, measures(within)[part])

    self._each(score)

  def save(self, step: int, state: State) -> None:
    """Each in its folder, with what all slots had and at which step."""
    slots = [[slot.name, step - slot.offset] for slot in self.slots]
    for number, slot in enumerate(self.slots):
      if run := slot.run:
        run.progress["ensemble"] = {"step": step, "slots": slots}
        run.save(step - slot.offset, self._take(state, number))

  def report(self) -> Report:
    scores = [run.history[-1]["score"] for run in self.live] or [math.nan]
    train = sum(not run.has_ended for run in self.live)
    wait = f", {len(self.waiting)} wait" if self.waiting else ""
    shown = f"{train} train{wait}, {min(scores):.4f} to {max(scores):.4f}"
    reports = {run.title: run.report() for run in self.live}
    return Report(
      shown,
      [f"{title}: {x}" for title, each in reports.items() for x in each.lines],
    )

  def refill(self, step: int, state: State) -> Refilled | None:
    """What has ended is finished, but for texts: they may need the memory."""
    for slot in self.slots:
      if (run := slot.run) and run.has_ended:
        self._leave(slot, run)
        if self.setup.task.write_texts is None:
          run.finish()
          run.close()
          self._clock.took("result")
    filled = self._fill(step)
    for number in filled:
      if run := self.slots[number].run:
        state = self._put(state, run.start(), np.int32(number))
        self._record(run)
        self._log(f"{run.title} begins, {len(self.waiting)} more wait")
    if not filled:
      return None
    self._gather_numbers()
    return state, self.batches(step)


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
