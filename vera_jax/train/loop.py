"""`train_and_evaluate`: a run from its config to its result.

Each epoch: step through the data -> evaluate -> save -> log. The next step is
dispatched before the last one's metrics are read.
"""

import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vera_jax.progress import ProgressBar
from vera_jax.train.config import check_settings
from vera_jax.train.distributed import is_first
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
    setup = build_setup(run.config)
    with run.opened(setup):
      if run.result is None and not run.has_ended:
        train(run, setup, began)
      return run.finish(setup)


def train(run: Any, setup: Setup, began: float) -> None:
  """The training loop: from the last save, or the start, to the last epoch.

  Args:
    run: a `Run`, or an `Ensemble` of several.
    setup: what it is made of.
    began: when the user began to wait for the first step, on
      `time.monotonic`'s clock.
  """
  first = run.first_step
  state = run.start(setup, first)
  step_program = setup.make_step(state, runs=run.size)
  key, rates = run.key, run.rates

  def compile_for(batch: Any) -> Any:
    """Compile for a microbatch's shape, in another thread, if need be."""
    shape = tuple(array.shape for array in batch.values())
    setup.background.compile(
      shape, lambda: step_program.lower(setup.frozen, batch, key)
    )
    return shape

  with (
    run.training(setup, first),
    ProgressBar(steps=setup.steps, step=first, primary=is_first()) as bar,
    watch() as flag,
  ):
    run.log = bar.log
    for line in introduction(setup, run.titles):
      bar.log(line)
    if first:
      bar.log(f"resumed at step {first} of {setup.steps}")
    stop = Stop(flag, setup.mesh)
    unread: list[tuple[int, Any]] = []  # steps whose metrics are on their way

    def read() -> None:
      for number, metrics in unread:
        bar.advance(number, loss=run.note_step(number, metrics))
      unread.clear()

    batches = setup.data.train_batches(seeds=run.seeds, start_step=first)
    for number, microbatches in batches:
      asked = stop.ask()
      placed = [setup.put_batch(b, runs=run.size) for b in microbatches]
      shapes = [compile_for(batch) for batch in placed]
      if number == first:  # the other shapes are compiled behind this one
        for sample in setup.data.train_samples(runs=run.size):
          compile_for(setup.put_sample(sample, runs=run.size))
      for shape in shapes:
        setup.background.wait(shape)
      state, metrics = step_program(state, setup.frozen, placed, key, rates)
      if number == first:
        setup.compile_evaluation()

      read()  # the step before, while this one runs
      done = number + 1
      unread.append((done, metrics))
      if number == first:
        read()
        seconds = time.monotonic() - began
        bar.log(f"first step done {seconds:.1f} s after the start")

      ends_epoch = done % setup.steps_between_evaluations == 0
      if not (ends_epoch or stop.answer(asked) or run.has_ended):
        continue
      read()
      if ends_epoch:
        setup.background.wait("evaluate")
        run.end_epoch(done, state)
      run.save(done, state, ends_epoch=ends_epoch)
      if ends_epoch:
        bar.show_score(run.score_line)
        for line in run.epoch_lines:
          bar.log(line)
      if caught := stop.answer(asked):
        raise Interrupted(
          f"Stopped by {caught.name}, saved at step {done} of {setup.steps}."
          " The same command goes on from there."
        )
      if run.has_ended:
        return
