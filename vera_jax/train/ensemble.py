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
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vera_jax.adapters.methods import method_named
from vera_jax.errors import UserError
from vera_jax.train.config import check_settings
from vera_jax.train.distributed import is_first
from vera_jax.train.logging import ProgressBar
from vera_jax.train.optim import rates_of
from vera_jax.train.preemption import Interrupted, Stop, nothing_to_save, watch
from vera_jax.train.run import Run
from vera_jax.train.runtime import prepare
from vera_jax.train.setup import Setup, build_setup, introduction
from vera_jax.train.start import begin
from vera_jax.train.step import State


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
  if left:
    began = begin()
    prepare()
    with nothing_to_save(), ExitStack() as stack:
      for run in left:
        stack.enter_context(run.locked())
      setup = build_setup(left[0].config)
      for run in left:
        stack.enter_context(run.opened())
      for step, live, slots in _groups(left, runs):
        _train(setup, step, live, slots, began)
      for run in left:
        if run.failure is None:
          run.finish(setup)
  outcomes = [run.result or run.failure for run in runs]
  return [outcome for outcome in outcomes if outcome is not None]


def _groups(
  left: Sequence[Run], runs: Sequence[Run]
) -> Iterator[tuple[int, list[Run], list[Run]]]:
  """Yields (step, the runs that train on from there, the program's slots).

  Runs that can stand at the same step train together; to meet others a run
  goes back by one save and no further, which is how far apart the runs are when
  they were killed between two saves. The slots are those that were saved, idle
  ones too, since another program would give other bits.
  """
  open_runs = [run for run in left if run.result is None and not run.has_ended]
  while open_runs:
    step = min(run.saves.resumable[-1] for run in open_runs)
    live = [run for run in open_runs if step in run.saves.resumable]
    slots = live
    if step:
      saved = [run.saves.progress(step).get("ensemble") for run in live]
      own = {_name(run.config): run for run in runs}
      if saved[0] and saved.count(saved[0]) == len(saved):
        if all(name in own for name in saved[0]):
          slots = [own[name] for name in saved[0]]
    yield step, live, slots
    open_runs = [run for run in open_runs if run not in live]


def _train(
  setup: Setup, first: int, live: list[Run], slots: list[Run], began: float
) -> None:
  """From a step on, until every run has ended or failed."""
  together, live = len(live), list(live)
  for run in live:
    run.progress["ensemble"] = [_name(slot.config) for slot in slots]
  states = {
    run: run.restore(first, setup.shape)
    if first
    else setup.first_state(run.config)
    for run in live
  }
  filler = states[live[0]]  # of idle slots
  places = jax.tree.map(_behind_runs, setup.shape)
  state = jax.jit(
    lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states),
    out_shardings=places,
  )(*(states.get(run, filler) for run in slots))
  del states, filler
  step_program = setup.make_step(
    jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        (len(slots), *leaf.shape), leaf.dtype, sharding=place
      ),
      setup.shape,
      places,
    ),
    runs=len(slots),
  )
  take = jax.jit(
    lambda state, slot: jax.tree.map(lambda leaf: leaf[slot], state),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, setup.shape),
  )

  def state_of(run: Run) -> State:
    return take(state, slots.index(run))

  seeds = [run.config.seed for run in slots]
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  each = [rates_of(run.config) for run in slots]
  rates = {n: jnp.asarray([r[n] for r in each], jnp.float32) for n in each[0]}
  before = {run: run.progress["seconds"] for run in live}
  started = time.monotonic()

  with (
    ExitStack() as files,
    ProgressBar(steps=setup.steps, step=first, primary=is_first()) as bar,
    watch() as flag,
  ):
    writers = {
      run: files.enter_context(run.metric_writer(first)) for run in live
    }
    for line in introduction(setup, [run.title for run in live]):
      bar.log(line)
    if first:
      bar.log(f"resumed at step {first} of {setup.steps}")
    stop = Stop(flag, setup.mesh)

    def fail(run: Run, what: str, step: int) -> None:
      live.remove(run)
      reason = run.fail(what, step=step, steps=setup.steps)
      bar.log(f"{run.title} failed. {reason}")

    def read(unread: tuple[int, Any] | None) -> None:
      """Wait for a step's metrics; a run whose loss is not finite fails."""
      if unread is None:
        return
      number, metrics = unread
      columns = {name: np.asarray(values) for name, values in metrics.items()}
      losses = []
      for run in list(live):
        slot = slots.index(run)
        values = {name: float(x[slot]) for name, x in columns.items()}
        if wrong := run.note_step(writers[run], number, values):
          fail(run, wrong, number)
        else:
          losses.append(values["loss"])
      if losses:
        bar.advance(number, loss=sum(losses) / len(losses))

    unread = None
    batches = setup.data.train_batches(seeds=seeds, start_step=first)
    for number, microbatches in batches:
      asked = stop.ask()
      placed = [setup.put_batch(batch, runs=True) for batch in microbatches]
      state, metrics = step_program(state, setup.frozen, placed, keys, rates)
      if number == first:
        setup.compile_evaluation()
      read(unread)  # the step before, while this one runs
      done, unread = number + 1, (number + 1, metrics)
      ends_epoch = done % setup.data.epoch_steps == 0
      if number == first:
        read(unread)
        unread = None
        passed = time.monotonic() - began
        bar.log(f"first step done {passed:.1f} s after the start")
      caught = stop.answer(asked)
      if not ends_epoch and caught is None and live:
        continue

      read(unread)
      unread = None
      if ends_epoch:
        setup.background.wait("evaluate")
        for run in list(live):
          measure_batch = setup.measure_with(state_of(run).params)
          evaluation = setup.task.evaluate(measure_batch, setup.data)
          if evaluation.finite:
            run.note_epoch(writers[run], done, evaluation, setup=setup)
          else:
            fail(run, "dev output is nan", done)
      for run in live:
        seconds = time.monotonic() - started
        run.progress["seconds"] = before[run] + seconds
        run.save(done, state_of(run), ends_epoch=ends_epoch)
      if ends_epoch and live:
        scores = [run.history[-1]["score"] for run in live]
        bar.show_score(
          f"{len(live)} of {together} train, {setup.task.score_name}"
          f" {min(scores):.4f} to {max(scores):.4f}"
        )
        for run in live:
          bar.log(f"{run.title}: {run.epoch_line()}")
      if caught is not None:
        raise Interrupted(
          f"Stopped by {caught.name}, saved at step {done} of {setup.steps}."
          " The same command goes on from there."
        )
      live[:] = [run for run in live if not run.has_ended]
      if not live:
        return


def _behind_runs(leaf: Any) -> NamedSharding:
  """The leaf's placing behind a leading axis, which no device splits."""
  place = leaf.sharding
  return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))


# Which runs fit together: they share the base, the projections, the data and
# every shape. What the step takes as an argument, and what leaves start from,
# each may have its own.


def _own_keys(config: ConfigDict) -> set[str]:
  method = config.method
  keys = {"seed", f"{method}.lr", f"{method}.head_lr"}
  keys |= {"optim.adapter_lr", "optim.head_lr", "optim.weight_decay"}
  per_run = method_named(method).per_run
  return keys | {
    f"{method}.{name}" for name in per_run(config[method].to_dict())
  }


def _settings(config: ConfigDict, *, own: bool) -> dict[str, Any]:
  keys = _own_keys(config)
  values = flatten_dict(config.to_dict(), sep=".")
  return {
    key: value
    for key, value in values.items()
    if (key in keys) == own and not key.startswith("log.")
  }


def own_settings(config: ConfigDict) -> dict[str, Any]:
  """What tells a run from the others of its ensemble, by flat key."""
  return _settings(config, own=True)


def group_key(config: ConfigDict) -> str:
  """Runs with equal keys can train together, by `train_ensemble`."""
  return json.dumps(_settings(config, own=False), sort_keys=True)


def _name(config: ConfigDict) -> str:
  return json.dumps(own_settings(config), sort_keys=True)


def _check_group(configs: Sequence[ConfigDict]) -> None:
  """Refuse configs that can't train together, and the same run twice."""
  shared = [_settings(config, own=False) for config in configs]
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
  runs = [own_settings(config) for config in configs]
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
