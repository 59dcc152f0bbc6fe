"""`train_and_evaluate`: a run from its config to its result; and its loop.

Each epoch: step through the data, evaluate, save, log. The next step is
dispatched before the last one's metrics are read.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vera_jax.errors import UserError
from vera_jax.progress import ProgressBar
from vera_jax.train.clock import Clock
from vera_jax.train.config import check_settings
from vera_jax.train.distributed import is_first
from vera_jax.train.peers import errors_in, read_next
from vera_jax.train.preemption import (
  Interrupted,
  Stop,
  Stopped,
  nothing_to_save,
  watch,
)
from vera_jax.train.prepared_step import PreparedStep
from vera_jax.train.profile import Profile
from vera_jax.train.run import Run
from vera_jax.train.runtime import prepare
from vera_jax.train.setup import Setup, build_setup, introduction
from vera_jax.train.start import begin
from vera_jax.train.step import Metrics
from vera_jax.train.trainable import Trainable
from vera_jax.train.workdir import explain_full_disk


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
  if (parts := config.mesh.runs) > 1:
    raise UserError(
      f"config.mesh.runs={parts} splits the runs of an ensemble"
      " (--seeds=0,1,...), and this is one run: leave it unset."
    )
  run = Run(config, workdir)
  if not run.is_done:
    carry_out([run], lambda setup: [] if run.has_ended else [run])
  assert run.result is not None
  return run.result


def carry_out(
  runs: Sequence[Run],
  to_train: Callable[[Setup], Iterable[Trainable]],
  *,
  together: int = 1,
) -> None:
  """Train runs on one base, from their folders' locks to their results.

  Args:
    runs: those that are not done, equal in all that a `Setup` is made of.
    to_train: what is trained, one after another. Runs that have not begun may
      be opened by it, when they do.
    together: how many train at once.
  """
  began = begin()
  prepare()
  with nothing_to_save(), ExitStack() as stack:
    for run in runs:
      stack.enter_context(run.locked())
    stack.enter_context(errors_in(*(run.folder for run in runs)))
    for run in runs:  # inside, so that other processes hear it explained
      stack.enter_context(explain_full_disk(run.folder))
    setup = build_setup(runs[0].config, runs=together)
    for run in runs:
      stack.callback(run.close)
      if run.has_begun or len(runs) == 1:
        run.open(setup)
    for trainable in to_train(setup):
      train(trainable, setup, began)
    for run in runs:
      if run.failure is None and not run.is_done:
        run.finish()


def train(run: Trainable, setup: Setup, began: float) -> None:
  """The training loop: from the last save, or the start, to the last epoch.

  Args:
    run: a `Run`, or an `Ensemble` of several.
    setup: the data, the model and the optimiser.
    began: when the user began to wait for the first step, on
      `time.monotonic`'s clock.

  Raises:
    UserError: a loss or an output is not a finite number.
    Interrupted: after Ctrl-C or SIGTERM, once the run is saved.
  """
  first = done = run.first_step
  profile = Profile(setup.config.log.get("profile"), run.folder, run.steps)
  state = run.start()
  clock = Clock(began)
  with (
    ProgressBar(steps=run.steps, step=first, primary=is_first()) as bar,
    run.recording(bar.log, clock),
    watch(say=bar.log) as flag,
    profile,
  ):
    stop = Stop(flag, setup.mesh)
    step = PreparedStep(setup, run, state, clock, stop)
    for line in introduction(setup, run.titles):
      bar.log(line)
    if first:
      bar.log(f"resumed at step {first} of {run.steps}")

    unread: list[tuple[int, Metrics]] = []  # of steps that may still run
    batches = run.batches(first)

    def read_metrics() -> None:
      for at, metrics in unread:
        bar.advance(at, loss=run.record(at, metrics))
      unread.clear()

    def end_epoch() -> None:
      nonlocal state, batches
      read_metrics()
      clock.took("steps")
      stop.wait_for(setup.background, "evaluate")
      clock.took("compiling")
      run.evaluate(done, state, stop)
      clock.took("evaluation")
      run.save(done, state)
      report = run.report()
      for line in report.lines:
        bar.log(line)
      state, batches = run.refill(done, state) or (state, batches)
      bar.show_score(report.score, steps=run.steps)

    # Stopped comes to all processes at the same step, since all have to save.
    try:
      if run.lacks_scores:
        setup.compile_evaluation()
        clock.took("start")
        end_epoch()
      while not run.has_ended:
        _, microbatches = read_next(batches)
        # a batch that comes while a step still runs has cost no time
        runs = any(not metrics["loss"].is_ready() for _, metrics in unread)
        clock.took("start" if done == first else "steps" if runs else "data")
        stop.check()
        with profile.step(done + 1):
          state, metrics = step(state, microbatches)
        read_metrics()  # the step before, while this one runs
        done += 1
        unread.append((done, metrics))
        if done == first + 1:
          read_metrics()
          seconds = time.monotonic() - began
          bar.log(f"first step done {seconds:.1f} s after the start")
        clock.took("compiling" if done == first + 1 else "steps")
        if profile.is_last(done):
          read_metrics()
          profile.stop()
          clock.took("profiling")
        if done % setup.steps_between_evaluations == 0:
          end_epoch()
      stop.check(now=True)  # what comes now may take long
    except Stopped as stopped:
      read_metrics()
      clock.took("lost")  # an evaluation that was left is made again
      run.save(done, state)
      raise Interrupted(
        f"Stopped by {stopped.signal.name}, saved at step {done} of"
        f" {run.steps}. The same command goes on from there."
      ) from None
