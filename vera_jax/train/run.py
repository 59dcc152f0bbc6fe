"""One run's folder: what is saved and resumed, and when it has ended.

The loop (`loop.py`) trains a `Run`, or an `Ensemble` of several; a `Run` knows
how far its own training has come and keeps that in its folder. What is written
at its end is in `outcome.py`.
"""

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.plans import AUTO
from vera_jax.data.data import MeasureBatch
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.train.checkpoint import Checkpoints, good_save
from vera_jax.train.clock import Clock, Speed, sentence
from vera_jax.train.distributed import is_first, on_first
from vera_jax.train.flops import peak_of
from vera_jax.train.logging import MetricWriter
from vera_jax.train.optim import rates_at, rates_of
from vera_jax.train.outcome import SUBMISSION, write_answers, write_outcome
from vera_jax.train.preemption import Stop
from vera_jax.train.setup import Setup
from vera_jax.train.step import State
from vera_jax.train.trainable import Batches, Report
from vera_jax.train.workdir import (
  check_shared,
  check_workdir,
  explain_full_disk,
  first_start,
  lock_workdir,
  require_lock,
  write_config,
  write_failure,
)

log = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds in which a resumed run looks at the base's weights


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The epoch of the highest score; of equal ones the first."""
  return max(history, key=lambda epoch: (epoch["score"], -epoch["epoch"]))


def _no_progress() -> dict[str, Any]:
  return {
    "history": [],
    "loss_sum": 0.0,
    "seconds": 0.0,
    "evaluation_seconds": 0.0,
    "speed": {},
  }


class Run:
  """One training run: a `Trainable`.

  Attributes:
    progress: JSON values that a resumed run goes on from: the epochs' history,
      the losses summed since the last epoch, the loss of general texts at the
      start, the seconds trained and those of them that were for evaluation, the
      fingerprints of the data and of the base, and what `Speed.report` says.
    result, failure: what result.json or failed.json says, if it is there.
    has_begun: whether its folder had its config before this process.
    setup, saves: what it is made of and its checkpoints, while `is_open`.
    title: what tells it from the other runs of an ensemble.
  """

  size = None  # its state has no axis of runs
  is_open = False
  setup: Setup
  saves: Checkpoints

  def __init__(
    self,
    config: ConfigDict,
    workdir: str | Path,
    *,
    title: str = "",
    inputs: Path | None = None,
  ) -> None:
    """Look at the folder; nothing is written.

    Args:
      config: of the run.
      workdir: its folder.
      title: what tells it from the other runs of an ensemble.
      inputs: a sweep's folder with the checksums of what its runs read: one
        that has not begun has no save that would show a change.

    Raises:
      UserError: it holds the run of another config.
    """
    self.config = copy.deepcopy(config)
    self.folder = place(workdir)
    self.title = title or f"seed {config.seed}"
    written = check_workdir(self.folder, config.to_dict())
    if written is not None:
      self.choose_scan(written["model"]["scan"])
    self.has_begun = written is not None
    self.progress = _no_progress()
    self.result = results.read(self.folder)
    self.failure = results.read(self.folder, results.FAILED)
    self._inputs = inputs
    self._open = ExitStack()

  def choose_scan(self, scan: bool | str) -> None:
    """Take over how the layers lie, where the config leaves that open.

    A run goes on with what it began with: its saves have leaves of that shape.
    """
    if self.config.model.scan == AUTO:
      with self.config.ignore_type():  # of "auto", a text
        self.config.model.scan = scan

  @property
  def is_done(self) -> bool:
    """Whether the result is there, and the answers where they are asked for."""
    return self.result is not None and not self._lacks_answers

  @property
  def _lacks_answers(self) -> bool:
    return self.config.predict_test and not (self.folder / SUBMISSION).exists()

  @property
  def history(self) -> list[dict[str, Any]]:
    return self.progress["history"]

  @property
  def has_ended(self) -> bool:
    """Whether it has trained all its epochs, or those its patience allows."""
    history, optim = self.history, self.config.optim
    if self.result is not None:
      return True
    if not history:
      return False
    last = history[-1]["epoch"]
    if last >= optim.epochs:
      return True
    if optim.patience is None:
      return False
    return last - best_epoch(history)["epoch"] >= optim.patience

  @contextmanager
  def locked(self) -> Iterator[None]:
    """Keep other processes out of the folder, which is made if missing."""
    with ExitStack() as stack:
      on_first(lambda: stack.enter_context(lock_workdir(self.folder)))
      with explain_full_disk(self.folder):
        check_shared(self.folder)
      yield

  def open(self, setup: Setup) -> None:
    """Make the folder this config's, open its checkpoints, restore progress.

    Raises:
      UserError: the run began with other data; the message says which splits.
    """
    self.setup, self.failure = setup, None
    self.choose_scan(setup.model.blueprint.scan)
    config = self.config.to_dict()
    on_first(lambda: write_config(self.folder, config))
    checkpoints = Checkpoints(self.folder / "checkpoints", config)
    self.saves = self._open.enter_context(checkpoints)
    self.is_open = True
    for step in reversed(self.saves.steps):
      progress = self.saves.progress(step)
      history = progress["history"]
      if not history or best_epoch(history)["step"] in self.saves.steps:
        self.progress |= progress
        break
      # The result needs the best epoch's leaves: that epoch is trained again.
      log.warning(
        "%s: step %d is not gone on from, since the save of the best epoch,"
        " step %d, is not there.",
        *(self.folder, step, best_epoch(history)["step"]),
      )
      self.saves.forget_after(step - 1)
    if self._inputs is not None:
      begun = results.read(self._inputs, self._inputs_file) or {}
      data = self.progress.get("data", {})
      self.progress["data"] = begun.get("data", {}) | data
      if "base" in begun:
        self.progress.setdefault("base", begun["base"])
    self._check_data()
    patience = PATIENCE if "base" in self.progress else 0.0
    on_first(partial(self._check_base, patience=patience))

  def close(self) -> None:
    self._open.close()
    self.is_open = False

  def go_back(self, step: int) -> None:
    """Forget what was trained after a save, or after the start."""
    self.saves.forget_after(step)
    same = {k: self.progress[k] for k in ("data", "base") if k in self.progress}
    self.progress = _no_progress() | same
    if step:
      self.progress |= self.saves.progress(step)

  def _check_data(self) -> None:
    """Refuse data that are not those that the run began with."""
    now = {
      split: values["fingerprint"]
      for split, values in self.setup.data.record().items()
    }
    if digest := self.setup.model.digest:
      now["the pair A, B"] = digest
    before = self.progress.get("data", {})
    changed = [x for x in now if before.get(x, now[x]) != now[x]]
    if changed and self.result is None:
      raise UserError(
        f"The data have changed since the run in {self.folder} began:"
        f" {', '.join(changed)}, or what prepares them (the tokenizer, or"
        " Pillow for images). Put the files back, or choose another --workdir."
      )
    self.progress["data"] = before | now
    on_first(self._keep_inputs)

  def _check_base(self, *, patience: float | None = 0.0) -> None:
    """Refuse a base whose weights are not those that the run began with.

    All are read for that. Those of a large base are not within the patience;
    then a later save asks again.

    Args:
      patience: the most seconds to wait; None: as long as it takes.
    """
    wait([self.setup.fingerprint], patience)
    if not self.setup.fingerprint.done():
      return
    now = self.setup.fingerprint.result()
    if self.progress.setdefault("base", now) != now and self.result is None:
      raise UserError(
        f"The weights in {self.setup.base} have changed since the run in"
        f" {self.folder} began. Put the files back, or choose another"
        " --workdir."
      )
    self._keep_inputs()

  @property
  def _inputs_file(self) -> str:
    """Runs that read the same have one file of checksums."""
    config = self.config.to_dict()
    reads = [config["task"], config["data"], config["model"]["name"]]
    text = json.dumps(reads, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"

  def _keep_inputs(self) -> None:
    """What other runs of the sweep have to find."""
    if self._inputs is None:
      return
    splits = self.setup.data.record()  # the pair A, B is each run's own
    kept = {"data": {x: self.progress["data"][x] for x in splits}}
    if "base" in self.progress:
      kept["base"] = self.progress["base"]
    if results.read(self._inputs, self._inputs_file) != kept:
      self._inputs.mkdir(parents=True, exist_ok=True)
      results.write(self._inputs, kept, self._inputs_file)

  # What the loop asks of a run; see `Trainable`.

  @property
  def titles(self) -> list[str]:
    return [self.title]

  @property
  def steps(self) -> int:
    return self.setup.steps

  @cached_property
  def key(self) -> PRNGKeyArray:
    return jax.random.key(self.config.seed)

  @cached_property
  def rates(self) -> dict[str, Array]:
    rates = rates_of(self.config, self.setup.extent)
    return {name: jnp.float32(value) for name, value in rates.items()}

  @property
  def first_step(self) -> int:
    return (self.is_open and self.saves.latest_step) or 0

  @property
  def lacks_scores(self) -> bool:
    first = self.first_step
    scored = self.history[-1]["step"] if self.history else 0
    return scored < first and not first % self.setup.steps_between_evaluations

  def start(self) -> State:
    step = self.first_step
    self.progress.pop("ensemble", None)  # an ensemble sets it anew
    if not step:
      state = self.setup.first_state(self.config)
      if (measure := self.setup.task.general_loss) is not None:
        measure_batch = self.setup.measure_with(state.params)
        before = measure(measure_batch, self.setup.data)
        self.progress["general_loss"] = before
      return state
    self.saves.forget_after(step)  # those that can't be gone on from
    state, _ = self.saves.restore(step, self.setup.shape)
    return state

  def batches(self, step: int) -> Batches:
    data = self.setup.data
    return data.train_batches(seeds=self.config.seed, start_step=step)

  def refill(self, step: int, state: State) -> None:
    """A run alone has no slots."""

  @contextmanager
  def recording(
    self, log: Callable[[str], None], clock: Clock
  ) -> Iterator[None]:
    """metrics.jsonl and its companions are open."""
    del log  # there is nothing to say
    since = clock.last
    if is_first():  # a run that is tried again has not failed
      (self.folder / results.FAILED).unlink(missing_ok=True)
      since = first_start(self.folder, clock.last)
    self._clock, peak = clock, peak_of(self.setup.mesh)
    self._speed = Speed(clock, self.progress["speed"], since=since, peak=peak)
    before, began = self.progress["seconds"], time.monotonic()
    self._seconds = lambda: before + time.monotonic() - began
    with MetricWriter(
      self.folder,
      config=self.config.to_dict(),
      step=self.first_step,
      scored=not self.lacks_scores,
      primary=is_first(),
      wandb=self.config.log.wandb,
      rates=partial(rates_at, config=self.config, extent=self.setup.extent),
    ) as self._writer:
      yield

  def record(self, step: int, metrics: Mapping[str, Any]) -> float:
    values = {name: float(value) for name, value in metrics.items()}
    self._speed.record(tokens=values.pop("tokens"), flops=values.pop("flops"))
    for name, value in values.items():
      if not math.isfinite(value):
        raise UserError(self._fail(f"{name} is {value}", step))
    self.progress["loss_sum"] += values["loss"]
    if step % self.config.log.every == 0:
      self._writer.write(step, values | self._speed.metrics())
    return values["loss"]

  def evaluate(self, step: int, state: State, stop: Stop) -> None:
    self.score(step, self.setup.measure_with(state.params, stop))

  def score(self, step: int, measure_batch: MeasureBatch) -> None:
    """`evaluate`, by what measures batches with the state's leaves."""
    if self.history and self.history[-1]["step"] == step:
      return  # a signal stopped the evaluation of another run of an ensemble
    task, data = self.setup.task, self.setup.data
    began = time.monotonic()
    evaluation = task.evaluate(measure_batch, data)
    self.progress["evaluation_seconds"] += time.monotonic() - began
    if not evaluation.finite:
      raise UserError(self._fail("dev output is nan", step))
    losses = self.progress["loss_sum"]
    epoch = {
      "epoch": step // data.epoch_steps,
      "step": step,
      "train_loss": losses / self.setup.steps_between_evaluations,
      "score": evaluation.scores[task.score_name],
      "metrics": evaluation.scores,
      "collapsed": evaluation.collapsed,
    }
    if evaluation.confusion is not None:
      epoch["confusion"] = evaluation.confusion
    self.history.append(epoch)
    self.progress["loss_sum"] = 0.0
    # before the save: a line beyond the last save is dropped on resuming, while
    # a save without its line would leave a gap
    self._writer.write(step, {"epoch": epoch["epoch"], **evaluation.scores})

  def save(self, step: int, state: State) -> None:
    on_first(partial(require_lock, self.folder))
    on_first(self._check_base)
    self.progress["seconds"] = self._seconds()
    self.progress["speed"] = self._speed.report()
    best = best_epoch(self.history)["step"] if self.history else None
    self._writer.flush()  # so that no line up to a save is ever lost
    self.saves.save(step, state, self.progress, best=best)
    self._clock.took("saving")
    self.progress["speed"] = self._speed.report()

  def report(self) -> Report:
    epoch, epochs = self.history[-1], self.config.optim.epochs
    scores = epoch["metrics"].items()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    line = (
      f"epoch {epoch['epoch']} of {epochs}: {shown}, training loss"
      f" {epoch['train_loss']:.4f}, {self.progress['seconds']:.0f} s"
    )
    line += f"; {sentence(self.progress['speed'])}"
    if epoch["collapsed"]:
      line += ", collapsed to one class"
    if self.has_ended and epoch["epoch"] < epochs:
      line += ", stopped early"
    score = f"{self.setup.task.score_name} {epoch['score']:.4f}"
    return Report(score, [line])

  def _fail(self, what: str, step: int) -> str:
    """Write failed.json: no training can go on from here; returns why."""
    reason = (
      f"The {what} at step {step} of {self.setup.steps}; the run stops here."
      f" {good_save(self.saves.latest_step)} Try, in another --workdir, lower"
      " learning rates, config.optim.grad_clip=1.0 or"
      " config.model.dtype=float32."
    )
    on_first(partial(require_lock, self.folder))
    self.failure = write_failure(
      self.folder, self.config.to_dict(), reason, step=step, primary=is_first()
    )
    return reason

  def finish(self) -> None:
    """Write the answers, the adapter, the texts and the result.

    They are of the best epoch, or of the last one where the task selects none.
    """
    setup, best, began = self.setup, self.history[-1], time.monotonic()
    on_first(partial(self._check_base, patience=None))
    if setup.task.selects:
      best = best_epoch(self.history)
    params = setup.replicated(
      self.saves.restore(best["step"], setup.shape)[0].params
    )
    if self._lacks_answers:
      write_answers(self.folder, setup, params)
    if self.result is None:
      self.result = write_outcome(
        self.folder, setup, self.config, params, best, self.progress, began
      )
