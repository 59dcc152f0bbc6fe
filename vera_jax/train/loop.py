"""`train_and_evaluate`: one run, from config to result.

Each epoch: step through the data -> evaluate -> save -> log. The next step is
dispatched before the last one's loss is read.
"""

import math
import os
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax import workdir as workdirs
from vera_jax.adapter_files import save_adapter
from vera_jax.checkpoint import Checkpoints
from vera_jax.data.batches import train_batches
from vera_jax.errors import UserError
from vera_jax.models.hf_weights import fingerprint
from vera_jax.projections import PRNG
from vera_jax.submission import write_submission
from vera_jax.train.evaluate import (
  Logits,
  dev_scores,
  is_collapsed,
  predictions,
  split_logits,
)
from vera_jax.train.interrupt import Flag, Interrupted, watch
from vera_jax.train.model import init_state
from vera_jax.train.report import Reporter
from vera_jax.train.run import Run, about, build_run, introduction
from vera_jax.train.settings import check_settings
from vera_jax.train.sharding import BATCH, put
from vera_jax.train.start import since_start
from vera_jax.train.step import State, eval_step, jit_train_step

SUBMISSION = "submission"
Progress = dict[str, Any]


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
  folder = Path(workdir).expanduser().absolute()
  workdirs.check(folder, config.to_dict())
  result = results.read(folder)
  wants_test = config.predict_test and not (folder / SUBMISSION).exists()
  if result is not None and not wants_test:
    return result
  use_compilation_cache()
  run = build_run(config)
  workdirs.claim(folder, config.to_dict())
  with Checkpoints(folder / "checkpoints") as saves:
    session = Session(run, saves)
    if result is None:
      session.train(folder)
    session.restore_best()
  if wants_test:
    session.predict_test(folder / SUBMISSION)
  if result is None:
    result = session.finish(folder)
  return result


def use_compilation_cache() -> None:
  """Keep compiled programs, unless JAX_COMPILATION_CACHE_DIR says where."""
  if jax.config.values["jax_compilation_cache_dir"] is None:
    cache = Path("~/.cache/vera_jax/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
  # small programs too: together they take as long as the step
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
  """The epoch of the highest score; of equal ones the first."""
  return max(history, key=lambda epoch: (epoch["score"], -epoch["epoch"]))


class Session:
  """One process's work on a run: compiled steps, state, running figures."""

  state: State
  progress: Progress

  def __init__(self, run: Run, saves: Checkpoints) -> None:
    self.run, self.saves = run, saves
    apply = run.model.module.apply
    self.state = init_state(run.model, run.tx, run.mesh)
    self._step = jit_train_step(self.state, apply=apply, tx=run.tx)
    self._evaluate = jax.jit(partial(eval_step, apply=apply))
    self._sharding = NamedSharding(run.mesh, BATCH)
    self.progress = {"history": [], "loss_sum": 0.0, "seconds": 0.0}
    if saves.latest_step is not None:
      self._restore(saves.latest_step)
    self._started = time.monotonic() - self.progress["seconds"]

  def _restore(self, step: int) -> None:
    self.state, self.progress = self.saves.restore(step, self.state)

  def restore_best(self) -> None:
    """The best epoch's state; the figures stay those of the whole run."""
    history = self.progress["history"]
    self.state, _ = self.saves.restore(best_epoch(history)["step"], self.state)

  def train(self, folder: Path) -> None:
    """From wherever the run stands to its last step."""
    run, config = self.run, self.run.config
    reporter = Reporter(
      folder,
      config=config.to_dict(),
      steps=run.steps,
      step=int(self.state.step),
      primary=jax.process_index() == 0,
      wandb=config.log.wandb,
    )
    with reporter as report, watch() as flag:
      for line in introduction(run):
        report.log(line)
      if self.state.step:
        report.log(f"resumed at step {self.state.step} of {run.steps}")
      self._train(report, flag)

  def _train(self, report: Reporter, flag: Flag) -> None:
    run, config = self.run, self.run.config
    key = jax.random.key(config.seed)
    batches = train_batches(
      run.data.tokens["train"],
      run.data.train_layout,
      batch_size=config.optim.batch_size,
      seed=config.seed,
      start_step=int(self.state.step),
    )
    first, unread = int(self.state.step), None
    for step, passes in batches:
      if step == run.steps:
        return
      passes = put(passes, self._sharding)
      self.state, metrics = self._step(
        self.state, run.model.frozen, passes, key
      )
      self._read(unread, report)
      unread = step + 1, metrics
      ends_epoch = (step + 1) % run.epoch_steps == 0
      if ends_epoch or flag.caught or step == first:
        self._read(unread, report)
        unread = None
      if step == first:
        report.log(f"first step done {since_start():.1f} s after the start")
      if ends_epoch:
        self._end_epoch(step + 1, report)
      if flag.caught:
        self._stop(step + 1, flag.caught)

  def _read(
    self, unread: tuple[int, dict[str, jax.Array]] | None, report: Reporter
  ) -> None:
    """Wait for a step's figures; a loss that is not finite ends the run."""
    if unread is None:
      return
    step, metrics = unread
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
      if not math.isfinite(value):
        raise UserError(self._not_finite(name, value, step))
    self.progress["loss_sum"] += values["loss"]
    report.advance(step, loss=values["loss"])
    if step % self.run.config.log.every == 0:
      report.write(step, values)

  def _not_finite(self, name: str, value: float, step: int) -> str:
    kept = self.saves.latest_step
    last = "no checkpoint was saved yet"
    if kept is not None:
      last = f"the last good checkpoint is that of step {kept}"
    return (
      f"The {name} is {value} at step {step} of {self.run.steps}; the run"
      f" stops here and {last}. Try, in another --workdir, lower learning"
      " rates, config.optim.grad_clip=1.0 or config.model.dtype=float32."
    )

  def _end_epoch(self, step: int, report: Reporter) -> None:
    """Evaluate, save, log."""
    run, task = self.run, self.run.data.task
    logits = self._logits(task.dev_splits)
    for split in logits.values():
      if not np.isfinite(split).all():  # the epoch's last update broke it
        raise UserError(self._not_finite("dev output", math.nan, step))
    scores = dev_scores(task, logits, run.data.tokens)
    epoch = {
      "epoch": step // run.epoch_steps,
      "step": step,
      "train_loss": self.progress["loss_sum"] / run.epoch_steps,
      "score": scores[task.metrics[0]],
      "metrics": scores,
      "collapsed": is_collapsed(task, logits),
    }
    self.progress["history"].append(epoch)
    self.progress["loss_sum"] = 0.0
    # written first: a line beyond the last save is dropped on resuming
    report.write(step, {"epoch": epoch["epoch"], **scores})
    self._save(step, {name: epoch[name] for name in ("score", "epoch")})
    report.show_score(f"{task.metrics[0]} {epoch['score']:.4f}")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    report.log(
      f"epoch {epoch['epoch']} of {run.config.optim.epochs}: {shown}, training"
      f" loss {epoch['train_loss']:.4f}, {self.progress['seconds']:.0f} s"
      + (", collapsed to one class" if epoch["collapsed"] else "")
    )

  def _save(self, step: int, metrics: dict[str, float] | None) -> None:
    self.progress["seconds"] = time.monotonic() - self._started
    self.saves.save(step, self.state, self.progress, metrics)

  def _stop(self, step: int, number: signal.Signals) -> None:
    self._save(step, None)  # nothing to do where the epoch just ended
    raise Interrupted(
      f"Stopped by {number.name}, saved at step {step} of {self.run.steps}."
      " The same command goes on from there."
    )

  def _logits(self, splits: Iterable[str]) -> dict[str, Logits]:
    run = self.run
    return {
      name: split_logits(
        self._evaluate,
        self.state.params,
        run.model.frozen,
        run.data.tokens[name],
        run.data.eval_layouts[name],
        sharding=self._sharding,
      )
      for name in splits
    }

  def predict_test(self, folder: Path) -> None:
    """Answers to the unlabelled test split, as GLUE's server takes them."""
    task = self.run.data.task
    new = folder.with_name(folder.name + ".new")
    for name, logits in self._logits(task.test_splits).items():
      index = self.run.data.tokens[name].index
      write_submission(new, task, name, predictions(task, logits), index)
    new.rename(folder)  # all files or none

  def finish(self, folder: Path) -> dict[str, Any]:
    """Write the adapter and then, since it marks a run as done, the result."""
    run, history = self.run, self.progress["history"]
    best = best_epoch(history)
    facts = about(run)
    tokens = run.data.tokens
    result = {
      **facts,
      "best": best,
      "last": history[-1],
      "parameters": run.model.counts._asdict(),
      "learning_rates": run.rates,
      "history": history,
      "seconds": self.progress["seconds"],
      "data": {
        name: {
          "examples": len(split),
          "truncated": split.truncated,
          "fingerprint": split.fingerprint,
        }
        for name, split in tokens.items()
      },
      "config": run.config.to_dict(),
      **results.provenance(),
    }
    save_adapter(
      folder / "adapter",
      self.state.params,
      about={
        **facts,
        "score": best["score"],
        "settings": run.config[run.config.method].to_dict(),
        "projection_prng": PRNG,
        "base_fingerprint": fingerprint(run.base),
        "max_length": run.config.data.max_length,
        "parameters": result["parameters"],
        "versions": result["versions"],
      },
    )
    return results.write(folder, result)
