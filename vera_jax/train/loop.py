"""`train_and_evaluate`: a run from its config to its result.

Each epoch: step through the data -> evaluate -> save -> log. The next step is
dispatched before the last one's metrics are read.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vera_jax.errors import UserError
from vera_jax.train.config import check_settings
from vera_jax.train.distributed import is_first
from vera_jax.train.logging import ProgressBar
from vera_jax.train.optim import rates_of
from vera_jax.train.preemption import (
  Interrupted,
  Stop,
  nothing_to_save,
  watch,
)
from vera_jax.train.run import Run
from vera_jax.train.runtime import prepare
from vera_jax.train.setup import Setup, build_setup, introduction
from vera_jax.train.start import begin


def train_and_evaluate(
  config: ConfigDict, workdir: str | Path
) -> dict[str, Any]:
  """Train by a config, evaluate each epoch, and return the run's result.

  The same config and workdir again: a finished run's result is returned, an
  unfinished run goes on from its last save, to the same bits as if it had never
  been interrupted.

  Args:
    config: as `configs/*.py` make it.
    workdir: the run's folder; `workdir.py` says what it holds.

  Returns:
    The contents of result.json.

  Raises:
    UserError: for whatever the user can mend; the message says how.
    Interrupted: after Ctrl-C or SIGTERM, once the run is saved.
  """
  check_settings(config)
  run = Run(config, workdir)
  if run.is_done:
    assert run.result is not None
    return run.result
  began = begin()
  prepare()
  with nothing_to_save(), run.locked():
    setup = build_setup(config)
    with run.opened():
      if run.result is None and not run.has_ended:
        _train(run, setup, began)
      return run.finish(setup)


def _train(run: Run, setup: Setup, began: float) -> None:
  """From the last save, or from the start, to the last epoch."""
  first = run.saves.latest_step or 0
  if first:
    state = run.restore(first, setup.shape)
  else:
    state = setup.first_state(run.config)
  step_program = setup.make_step(setup.shape)
  key = jax.random.key(run.config.seed)
  rates = {name: jnp.float32(x) for name, x in rates_of(run.config).items()}
  seconds_before, started = run.progress["seconds"], time.monotonic()

  with (
    run.metric_writer(first) as writer,
    ProgressBar(steps=setup.steps, step=first, primary=is_first()) as bar,
    watch() as flag,
  ):
    for line in introduction(setup, [run.title]):
      bar.log(line)
    if first:
      bar.log(f"resumed at step {first} of {setup.steps}")
    stop = Stop(flag, setup.mesh)

    def read(unread: tuple[int, Any] | None) -> None:
      """Wait for a step's metrics; a loss that is not finite ends the run."""
      if unread is None:
        return
      number, metrics = unread
      values = {name: float(value) for name, value in metrics.items()}
      if wrong := run.note_step(writer, number, values):
        raise UserError(run.fail(wrong, step=number, steps=setup.steps))
      bar.advance(number, loss=values["loss"])

    def compile_for(batch: Any) -> int:
      """Compile for a microbatch's shape, in another thread, if need be."""
      rows = batch["labels"].shape[0]
      setup.background.compile(
        rows, lambda: step_program.lower(setup.frozen, batch, key)
      )
      return rows

    unread = None
    batches = setup.data.train_batches(seeds=run.config.seed, start_step=first)
    for number, microbatches in batches:
      asked = stop.ask()
      placed = [setup.put_batch(batch) for batch in microbatches]
      shapes = [compile_for(batch) for batch in placed]
      if number == first:  # the other shapes behind this one
        for batch in setup.data.train_samples():
          compile_for(setup.put_sample(batch))
      for shape in shapes:
        setup.background.wait(shape)
      state, metrics = step_program(state, setup.frozen, placed, key, rates)
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
      if not ends_epoch and caught is None:
        continue

      read(unread)
      unread = None
      if ends_epoch:
        setup.background.wait("evaluate")
        measure_batch = setup.measure_with(state.params)
        evaluation = setup.task.evaluate(measure_batch, setup.data)
        if not evaluation.finite:  # the epoch's last update broke it
          what = "dev output is nan"
          raise UserError(run.fail(what, step=done, steps=setup.steps))
        run.note_epoch(writer, done, evaluation, setup=setup)
      seconds = time.monotonic() - started
      run.progress["seconds"] = seconds_before + seconds
      run.save(done, state, ends_epoch=ends_epoch)
      if ends_epoch:
        score = run.history[-1]["score"]
        bar.show_score(f"{setup.task.score_name} {score:.4f}")
        bar.log(run.epoch_line())
      if caught is not None:
        raise Interrupted(
          f"Stopped by {caught.name}, saved at step {done} of {setup.steps}."
          " The same command goes on from there."
        )
      if run.has_ended:
        return
