"""One run's folder and outcome: what is saved, resumed and written at its end.

The loop (`loop.py`) and the ensemble (`ensemble.py`) train; a `Run` knows how
far its own training has come and keeps that in its folder.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.files import save_adapter, tensors
from vera_jax.adapters.methods import settings_in
from vera_jax.adapters.plans import AUTO
from vera_jax.adapters.projections import PRNG
from vera_jax.adapters.vector_norms import adapter_norms, as_json
from vera_jax.errors import UserError
from vera_jax.models.hf_weights import fingerprint
from vera_jax.pretrained.sharding import REPLICATED
from vera_jax.train.checkpoint import Checkpoints, good_save
from vera_jax.train.distributed import is_first, on_first
from vera_jax.train.logging import MetricWriter
from vera_jax.train.optim import learning_rates, rates_of
from vera_jax.train.setup import Setup
from vera_jax.train.step import State
from vera_jax.train.workdir import (
  check_workdir,
  explain_full_disk,
  lock_workdir,
  write_config,
)

log = logging.getLogger(__name__)

NO_MEMORY = "RESOURCE_EXHAUSTED"  # how XLA's message begins
SUBMISSION = "submission"  # the folder of the answers to the test splits


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The epoch of the highest score; of equal ones the first."""
  return max(history, key=lambda epoch: (epoch["score"], -epoch["epoch"]))


class Run:
  """One training run.

  Attributes:
    progress: JSON values that a resumed run goes on from: the epochs' history,
      the losses summed since the last epoch, the seconds trained and those of
      them that were for evaluation, and the fingerprints of the data.
    result, failure: what result.json or failed.json says, if it is there.
    saves: the checkpoints, while the run is open.
    setup, log: what it is made of and where lines for a person go, while it
      trains.
    title: what tells it from the other runs of an ensemble.
  """

  saves: Checkpoints
  setup: Setup
  log: Callable[[str], None]

  def __init__(
    self, config: ConfigDict, workdir: str | Path, *, title: str = ""
  ) -> None:
    """Look at the folder; nothing is written.

    Raises:
      UserError: it holds the run of another config.
    """
    self.config = copy.deepcopy(config)
    self.folder = Path(workdir).expanduser().absolute()
    self.title = title or f"seed {config.seed}"
    written = check_workdir(self.folder, config.to_dict())
    if written is not None:
      self.choose_scan(written["model"]["scan"])
    self.progress: dict[str, Any] = {
      "history": [],
      "loss_sum": 0.0,
      "seconds": 0.0,
      "evaluation_seconds": 0.0,
    }
    self.result = results.read(self.folder)
    self.failure = results.read(self.folder, results.FAILED)

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
    return self.result is not None and not self._wants_answers

  @property
  def _wants_answers(self) -> bool:
    return self.config.predict_test and not (self.folder / SUBMISSION).exists()

  @property
  def history(self) -> list[dict[str, Any]]:
    return self.progress["history"]

  @property
  def has_ended(self) -> bool:
    """Whether it has trained all its epochs, or those its patience allows."""
    history, optim = self.history, self.config.optim
    if not history:
      return False
    last = history[-1]["epoch"]
    if last >= optim.epochs:
      return True
    if optim.patience is None:
      return False
    waited = last - best_epoch(history)["epoch"]
    return waited >= optim.patience

  @contextmanager
  def locked(self) -> Iterator[None]:
    """Keep other processes out of the folder, which is made if missing."""
    with ExitStack() as stack:

      def lock() -> None:
        stack.enter_context(lock_workdir(self.folder))
        stack.enter_context(explain_full_disk(self.folder))

      on_first(lock)
      yield

  @contextmanager
  def opened(self, setup: Setup) -> Iterator[None]:
    """The folder is this config's, its checkpoints open, progress restored.

    Raises:
      UserError: the run began with other data; the message says which splits.
    """
    self.choose_scan(setup.model.blueprint.scan)
    config = self.config.to_dict()
    on_first(lambda: write_config(self.folder, config))
    with Checkpoints(self.folder / "checkpoints", config) as self.saves:
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
      record = setup.data.record()
      data = {split: own["fingerprint"] for split, own in record.items()}
      before = self.progress.get("data", {})  # older saves don't say
      changed = [x for x in data if before.get(x, data[x]) != data[x]]
      if changed and self.result is None:
        raise UserError(
          f"The data have changed since the run in {self.folder} began:"
          f" {', '.join(changed)}, or what prepares them (the tokenizer, or"
          " Pillow for images). Put the files back, or choose another"
          " --workdir."
        )
      self.progress["data"] = before | data
      yield

  # What the loop asks of a run; an ensemble answers the same.

  size: int | None = None  # runs on a leading axis of the state; None: no axis

  @property
  def first_step(self) -> int:
    """Where training goes on: the last save, or the start."""
    return self.saves.latest_step or 0

  @property
  def seeds(self) -> int | list[int]:
    """Of the batches' order."""
    return self.config.seed

  @property
  def titles(self) -> list[str]:
    return [self.title]

  @property
  def key(self) -> PRNGKeyArray:
    """Of dropout and of methods that draw random numbers."""
    return jax.random.key(self.config.seed)

  @property
  def rates(self) -> dict[str, Any]:
    """The optimiser's numbers, as arguments of the step."""
    rates = rates_of(self.config)
    return {name: jnp.float32(value) for name, value in rates.items()}

  def start(self, setup: Setup, step: int) -> State:
    """The state at a step: that of a save, or the first one.

    Later saves are dropped.
    """
    if not step:
      return setup.first_state(self.config)
    self.saves.forget_after(step)
    state, progress = self.saves.restore(step, setup.shape)
    self.progress |= progress
    self.progress.pop("ensemble", None)  # an ensemble sets it anew
    return state

  @contextmanager
  def training(self, setup: Setup, step: int) -> Iterator[None]:
    """metrics.jsonl and its companions are open, from a step on."""
    self.setup, self._before = setup, self.progress["seconds"]
    self._started = time.monotonic()
    if is_first():  # a run that is tried again has not failed
      (self.folder / results.FAILED).unlink(missing_ok=True)
    with MetricWriter(
      self.folder,
      config=self.config.to_dict(),
      step=step,
      primary=is_first(),
      wandb=self.config.log.wandb,
    ) as self._writer:
      yield

  def note_step(self, step: int, metrics: Mapping[str, Any]) -> float:
    """Wait for a step's metrics and write them; returns the loss.

    Raises:
      UserError: one of them is not finite: the run has failed.
    """
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
      if not math.isfinite(value):
        raise UserError(self.fail(f"{name} is {value}", step))
    self.progress["loss_sum"] += values["loss"]
    if step % self.config.log.every == 0:
      self._writer.write(step, values)
    return values["loss"]

  def end_epoch(self, step: int, state: State) -> None:
    """Evaluate and note the scores.

    Raises:
      UserError: an output is not finite, since the last update broke it.
    """
    task, data = self.setup.task, self.setup.data
    began = time.monotonic()
    evaluation = task.evaluate(self.setup.measure_with(state.params), data)
    self.progress["evaluation_seconds"] += time.monotonic() - began
    if not evaluation.finite:
      raise UserError(self.fail("dev output is nan", step))
    epoch = {
      "epoch": step // data.epoch_steps,
      "step": step,
      "train_loss": (
        self.progress["loss_sum"] / self.setup.steps_between_evaluations
      ),
      "score": evaluation.scores[task.score_name],
      "metrics": evaluation.scores,
      "collapsed": evaluation.collapsed,
    }
    self.history.append(epoch)
    self.progress["loss_sum"] = 0.0
    # written first: a line beyond the last save is dropped on resuming
    self._writer.write(step, {"epoch": epoch["epoch"], **evaluation.scores})

  def save(self, step: int, state: State, *, ends_epoch: bool) -> None:
    seconds = time.monotonic() - self._started
    self.progress["seconds"] = self._before + seconds
    metrics = None
    if ends_epoch:
      metrics = {name: self.history[-1][name] for name in ("score", "epoch")}
    self.saves.save(step, state, self.progress, metrics)

  @property
  def score_line(self) -> str:
    """What the progress bar shows."""
    epoch = self.history[-1]
    return f"{self.setup.task.score_name} {epoch['score']:.4f}"

  @property
  def epoch_lines(self) -> list[str]:
    """The last epoch, for a person."""
    epoch, epochs = self.history[-1], self.config.optim.epochs
    scores = epoch["metrics"].items()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    line = (
      f"epoch {epoch['epoch']} of {epochs}: {shown}, training loss"
      f" {epoch['train_loss']:.4f}, {self.progress['seconds']:.0f} s"
    )
    if epoch["collapsed"]:
      line += ", collapsed to one class"
    if self.has_ended and epoch["epoch"] < epochs:
      line += ", stopped early"
    return [line]

  def fail(self, what: str, step: int) -> str:
    """Write failed.json: no training can go on from here; returns why."""
    reason = (
      f"The {what} at step {step} of {self.setup.steps}; the run stops here."
      f" {good_save(self.saves.latest_step)} Try, in another --workdir, lower"
      " learning rates, config.optim.grad_clip=1.0 or"
      " config.model.dtype=float32."
    )
    self.failure = {
      "task": self.config.task,
      "method": self.config.method,
      "seed": self.config.seed,
      "step": step,
      "failed": reason,
      "config": self.config.to_dict(),
    }
    if is_first():
      results.write(self.folder, self.failure, results.FAILED)
    return reason

  def finish(self, setup: Setup) -> dict[str, Any]:
    """Answers, adapter, texts and result of a run that has ended.

    They are of its best epoch, or of the last one where the task selects none.

    Returns:
      The contents of result.json.
    """
    best = best_epoch(self.history) if setup.task.selects else self.history[-1]
    params = self.saves.restore(best["step"], setup.shape)[0].params
    everywhere = NamedSharding(setup.mesh, REPLICATED)
    params = jax.jit(lambda p: p, out_shardings=everywhere)(params)
    answers = setup.task.write_answers
    if self._wants_answers and answers is not None:
      new = self.folder / f"{SUBMISSION}.new"
      write_new = answers(setup.measure_with(params), setup.data, new)

      def write_all() -> None:
        write_new()
        new.rename(self.folder / SUBMISSION)  # all files or none

      on_first(write_all)
    if self.result is None:
      # before the texts, whose failure must not cost what was trained
      on_first(partial(self._save_adapter, setup, params, best))
      # by all processes, since each may hold a part of the base
      trained = setup.trained(params) if setup.task.write_texts else None
      on_first(partial(self._write_result, setup, params, best, trained))
      self.result = results.read(self.folder)
    assert self.result is not None
    return self.result

  def _about(self, setup: Setup) -> dict[str, Any]:
    """What result.json and the adapter's file both say of the run."""
    config, task = self.config, setup.task
    return {
      "task": task.name,
      "method": config.method,
      "seed": config.seed,
      "base": config.model.name,
      "labels": list(task.labels),
      "kind": task.kind,
      **task.stored,
      "score_name": task.score_name,
      "projection_digest": setup.model.digest,
    }

  def _save_adapter(
    self, setup: Setup, params: Any, best: dict[str, Any]
  ) -> None:
    config = self.config
    save_adapter(
      self.folder / "adapter",
      params,
      about={
        **self._about(setup),
        "score": best["score"],
        "settings": settings_in(config, config.method),
        "projection_prng": PRNG,
        "base_fingerprint": fingerprint(setup.base),
        "quantise": setup.model.blueprint.quantise,
        "codes_digest": setup.model.codes,
        "max_length": config.data.max_length,
        "data": setup.data.record(),
        "parameters": setup.model.counts._asdict(),
        "versions": results.provenance()["versions"],
      },
    )

  def _write_result(
    self, setup: Setup, params: Any, best: dict[str, Any], trained: Any
  ) -> None:
    """Texts and then, since it marks a run as done, the result."""
    config, test = self.config, {}
    if setup.task.write_texts is not None:
      test = {"test": self._write_texts(setup.task.write_texts, trained)}
    result = {
      **self._about(setup),
      "best": best,
      "last": self.history[-1],
      **test,
      "stopped_early": self.history[-1]["epoch"] < config.optim.epochs,
      "parameters": setup.model.counts._asdict(),
      "learning_rates": learning_rates(config),
      "norms": as_json(adapter_norms(tensors(params))),
      "history": self.history,
      "seconds": self.progress["seconds"],
      "evaluation_seconds": self.progress["evaluation_seconds"],
      "members": len(self.progress.get("ensemble", [0])),
      "data": setup.data.record(),
      "config": config.to_dict(),
      **results.provenance(),
    }
    results.write(self.folder, result)

  def _write_texts(self, write: Callable[..., Any], trained: Any) -> Any:
    """The task's texts and scores; where there are none, the reason.

    The same command would fail here again, so the result comes without them.
    """
    try:
      return write(trained, self.folder)
    except (UserError, jax.errors.JaxRuntimeError) as error:
      if not isinstance(error, UserError) and NO_MEMORY not in str(error):
        raise
      missing = f"The run's texts were not written or not scored: {error}"
      return {"inputs": 0, "scores": {}, "missing": missing, "seconds": 0.0}
