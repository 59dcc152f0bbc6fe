"""One run's folder and outcome: what is saved, resumed and written at its end.

The loop (`loop.py`) and the ensemble (`ensemble.py`) train; a `Run` knows how
far its own training has come and keeps that in its folder.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.files import save_adapter, tensors
from vera_jax.adapters.norms import adapter_norms, as_json
from vera_jax.adapters.projections import PRNG
from vera_jax.models.hf_weights import fingerprint
from vera_jax.tasks.task import Evaluation
from vera_jax.train.checkpoint import Checkpoints, good_save
from vera_jax.train.distributed import is_first, on_first
from vera_jax.train.logging import MetricWriter
from vera_jax.train.optim import learning_rates
from vera_jax.train.setup import Setup
from vera_jax.train.sharding import REPLICATED
from vera_jax.train.step import State
from vera_jax.train.workdir import (
  check_workdir,
  explain_full_disk,
  lock_workdir,
  write_config,
)

log = logging.getLogger(__name__)

ANSWERS = "submission"  # the folder of the answers to the test splits


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The epoch of the highest score; of equal ones the first."""
  return max(history, key=lambda epoch: (epoch["score"], -epoch["epoch"]))


class Run:
  """One training run.

  Attributes:
    progress: JSON values that a resumed run goes on from: the epochs' history,
      the losses summed since the last epoch, the seconds trained.
    result, failure: what result.json or failed.json says, if it is there.
    saves: the checkpoints, while the run is open.
    title: what tells it from the other runs of an ensemble.
  """

  saves: Checkpoints

  def __init__(
    self, config: ConfigDict, workdir: str | Path, *, title: str = ""
  ) -> None:
    """Look at the folder; nothing is written.

    Raises:
      UserError: it holds the run of another config.
    """
    self.config, self.folder = config, Path(workdir).expanduser().absolute()
    self.title = title or f"seed {config.seed}"
    check_workdir(self.folder, config.to_dict())
    self.progress: dict[str, Any] = {
      "history": [],
      "loss_sum": 0.0,
      "seconds": 0.0,
    }
    self.result = results.read(self.folder)
    self.failure = results.read(self.folder, results.FAILED)

  @property
  def is_done(self) -> bool:
    """Whether the result is there, and the answers where they are asked for."""
    return self.result is not None and not self._wants_answers

  @property
  def _wants_answers(self) -> bool:
    return self.config.predict_test and not (self.folder / ANSWERS).exists()

  @property
  def history(self) -> list[dict[str, Any]]:
    return self.progress["history"]

  @property
  def has_ended(self) -> bool:
    """Whether it has trained all its epochs, or those its patience allows."""
    history, optim = self.history, self.config.optim
    if len(history) == optim.epochs:
      return True
    if not history or optim.patience is None:
      return False
    waited = len(history) - best_epoch(history)["epoch"]
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
  def opened(self) -> Iterator[None]:
    """The folder is this config's, its checkpoints open, progress restored."""
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
      yield

  def restore(self, step: int, shape: State) -> State:
    """The state of a save; later saves are dropped."""
    self.saves.forget_after(step)
    state, progress = self.saves.restore(step, shape)
    self.progress |= progress
    return state

  def metric_writer(self, step: int) -> MetricWriter:
    """metrics.jsonl and its companions, from a step on."""
    if is_first():  # a run that is tried again has not failed
      (self.folder / results.FAILED).unlink(missing_ok=True)
    return MetricWriter(
      self.folder,
      config=self.config.to_dict(),
      step=step,
      primary=is_first(),
      wandb=self.config.log.wandb,
    )

  def note_step(
    self, writer: MetricWriter, step: int, metrics: Mapping[str, float]
  ) -> str | None:
    """Count a step in; returns what is wrong where a metric is not finite."""
    for name, value in metrics.items():
      if not math.isfinite(value):
        return f"{name} is {value}"
    self.progress["loss_sum"] += metrics["loss"]
    if step % self.config.log.every == 0:
      writer.write(step, metrics)
    return None

  def note_epoch(
    self,
    writer: MetricWriter,
    step: int,
    evaluation: Evaluation,
    *,
    setup: Setup,
  ) -> None:
    """Count an epoch in."""
    name, scores = setup.task.score_name, evaluation.scores
    epoch = {
      "epoch": step // setup.data.epoch_steps,
      "step": step,
      "train_loss": self.progress["loss_sum"] / setup.data.epoch_steps,
      "score": scores[name],
      "metrics": scores,
      "collapsed": evaluation.collapsed,
    }
    self.history.append(epoch)
    self.progress["loss_sum"] = 0.0
    # written first: a line beyond the last save is dropped on resuming
    writer.write(step, {"epoch": epoch["epoch"], **scores})

  def epoch_line(self) -> str:
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
    if self.has_ended and len(self.history) < epochs:
      line += ", stopped early"
    return line

  def save(self, step: int, state: State, *, ends_epoch: bool) -> None:
    metrics = None
    if ends_epoch:
      metrics = {name: self.history[-1][name] for name in ("score", "epoch")}
    self.saves.save(step, state, self.progress, metrics)

  def fail(self, what: str, *, step: int, steps: int) -> str:
    """Write failed.json: no training can go on from here; returns why."""
    reason = (
      f"The {what} at step {step} of {steps}; the run stops here."
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
    """Answers, adapter and result of a run that has ended, from its best epoch.

    Returns:
      The contents of result.json.
    """
    best = best_epoch(self.history)
    params = self.saves.restore(best["step"], setup.shape)[0].params
    everywhere = NamedSharding(setup.mesh, REPLICATED)
    params = jax.jit(lambda p: p, out_shardings=everywhere)(params)
    answers = setup.task.write_answers
    if self._wants_answers and answers is not None:
      new = self.folder / f"{ANSWERS}.new"
      write_new = answers(setup.measure_with(params), setup.data, new)

      def write_all() -> None:
        write_new()
        new.rename(self.folder / ANSWERS)  # all files or none

      on_first(write_all)
    if self.result is None:
      on_first(partial(self._write_result, setup, params, best))
      self.result = results.read(self.folder)
    assert self.result is not None
    return self.result

  def _write_result(
    self, setup: Setup, params: Any, best: dict[str, Any]
  ) -> None:
    """The adapter and then, since it marks a run as done, the result."""
    config, task = self.config, setup.task
    of_both = {
      "task": task.name,
      "method": config.method,
      "seed": config.seed,
      "base": config.model.name,
      "labels": list(task.labels),
      "score_name": task.score_name,
      "projection_digest": setup.model.digest,
    }
    provenance = results.provenance()
    parameters = setup.model.counts._asdict()
    save_adapter(
      self.folder / "adapter",
      params,
      about={
        **of_both,
        "score": best["score"],
        "settings": config[config.method].to_dict(),
        "projection_prng": PRNG,
        "base_fingerprint": fingerprint(setup.base),
        "max_length": config.data.max_length,
        "parameters": parameters,
        "versions": provenance["versions"],
      },
    )
    result = {
      **of_both,
      "best": best,
      "last": self.history[-1],
      "stopped_early": len(self.history) < config.optim.epochs,
      "parameters": parameters,
      "learning_rates": learning_rates(config),
      "norms": as_json(adapter_norms(tensors(params))),
      "history": self.history,
      "seconds": self.progress["seconds"],
      "members": len(self.progress.get("ensemble", [0])),
      "data": setup.data.record(),
      "config": config.to_dict(),
      **provenance,
    }
    results.write(self.folder, result)
