"""`train_and_evaluate`, a run from config to result; `train_members`, several.

Each epoch: step through the data -> evaluate -> save -> log. The next step is
dispatched before the last one's figures are read.

A run alone is a group of one. The members of a group take each step together,
in one program: what is trained is stacked, the base is there once.
"""

import math
import signal
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vera_jax.data.loader import sample_batch
from vera_jax.errors import UserError
from vera_jax.tasks.glue_data import write_submission
from vera_jax.train import workdir as workdirs
from vera_jax.train.checkpoint import Checkpoints, good_save
from vera_jax.train.config import check_settings
from vera_jax.train.crew import Crew
from vera_jax.train.distributed import is_first, on_first
from vera_jax.train.evaluate import (
  Logits,
  dev_scores,
  is_collapsed,
  predictions,
  split_logits,
)
from vera_jax.train.group import check_group, titles
from vera_jax.train.logging import MetricWriter, ProgressBar
from vera_jax.train.member import SUBMISSION, Member, best_epoch, cohorts
from vera_jax.train.model import init_state, start_of, state_shape
from vera_jax.train.preemption import (
  Interrupted,
  Stop,
  nothing_to_save,
  watch,
)
from vera_jax.train.run import Run, build_run, introduction
from vera_jax.train.runtime import Background, compiler_options, prepare
from vera_jax.train.sharding import BATCH, REPLICATED, put
from vera_jax.train.start import begin
from vera_jax.train.step import State, eval_step


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
  (member,) = _members([config], [workdir])
  member.failure = None  # tried again, from the last good save
  _train([member])
  if member.failure is not None:
    raise UserError(member.failure["failed"])
  return member.outcome


def train_members(
  configs: Sequence[ConfigDict], workdirs: Sequence[str | Path]
) -> list[dict[str, Any]]:
  """Train several runs at once, on one base, each in a folder of its own.

  Each is the run that `train_and_evaluate` makes of its config, to float
  rounding, and leaves the same folder. The same call again goes on from where
  all stand, to the same bits; any member's folder can go on alone too. Finished
  and failed members stay as they are.

  A member that stops early or fails leaves its slot idle; when half of the
  slots are idle, the next epoch's program is compiled without them.

  Args:
    configs: equal but for seed, learning rates, weight decay and VeRA's d_init;
      `group.group_key` tells which runs fit together.
    workdirs: the folder of each.

  Returns:
    For each the contents of its result.json, or of its failed.json where a loss
    was not finite: that has the reason under "failed".

  Raises:
    UserError: for whatever the user can mend; the message says how.
    Interrupted: after Ctrl-C or SIGTERM, once all members are saved.
  """
  members = _members(configs, workdirs)
  _train(members)
  return [member.outcome for member in members]


def _members(
  configs: Sequence[ConfigDict], folders: Sequence[str | Path]
) -> list[Member]:
  for config in configs:
    check_settings(config)
  check_group(configs)
  paths = [Path(folder).expanduser().absolute() for folder in folders]
  if len(set(paths)) < len(paths):
    raise UserError("Each member needs a workdir of its own.")
  members = []
  for config, path, title in zip(configs, paths, titles(configs), strict=True):
    workdirs.check_workdir(path, config.to_dict())
    members.append(Member(config, path, title=title))
  return members


def _train(members: Sequence[Member]) -> None:
  """Bring every member to its result or its failure."""
  left = [member for member in members if member.open]
  if not left:
    return
  began = begin()
  prepare()
  with nothing_to_save(), ExitStack() as stack:
    _hold([m for m in left if m.folder.exists()], stack)
    run = build_run(left[0].config)
    _claim(left, stack)
    for member in left:
      folder, config = member.folder / "checkpoints", member.config.to_dict()
      member.resume(stack.enter_context(Checkpoints(folder, config)))
    session = Session(run, began)
    for step, live, crew in cohorts(members):
      session.train(step, live, crew)
    for member in left:
      session.conclude(member)


def _hold(members: Sequence[Member], stack: ExitStack) -> None:
  """Their folders, until the stack is closed: as early as they are there."""

  def hold() -> None:
    for member in members:
      stack.enter_context(workdirs.lock_workdir(member.folder))
      stack.enter_context(workdirs.explain_full_disk(member.folder))
      member.held = True

  on_first(hold)


def _claim(members: Sequence[Member], stack: ExitStack) -> None:
  _hold([member for member in members if not member.held], stack)

  def claim() -> None:
    for member in members:
      workdirs.write_config(member.folder, member.config.to_dict())

  on_first(claim)


class Session:
  """One process's work on a group: who trains, who ends, what is written.

  Attributes:
    crew: the slots of the program; those of members that are not in `live`
      are idle, so that the others' program, and bits, stay the same.
    live: the members that train.
  """

  crew: Crew
  live: list[Member]
  report: ProgressBar

  def __init__(self, run: Run, began: float) -> None:
    self.run, self._began = run, began
    self._everywhere = NamedSharding(run.mesh, REPLICATED)
    self._evaluate = jax.jit(
      partial(eval_step, apply=run.model.module.apply),
      out_shardings=self._everywhere,  # each process reads all
      compiler_options=compiler_options(jax.default_backend()),
    )
    self._programs = Background()
    self._sharding = NamedSharding(run.mesh, BATCH)
    self._shape = state_shape(run.model, run.tx, run.mesh)

  def train(self, step: int, live: list[Member], crew: list[Member]) -> None:
    """From a step on, until every member has ended or failed."""
    self._started = time.monotonic()
    self._step, self.live = step, list(live)
    self._cohort = live
    self.crew = Crew(self.run, crew, {m: self._start(m) for m in live})
    self._before = {m: m.progress["seconds"] for m in live}
    with ExitStack() as files, watch() as flag:
      for member in live:
        member.forget_failure()
        member.figures = files.enter_context(self._figures(member))
      self.report = files.enter_context(
        ProgressBar(steps=self.run.steps, step=self._step, primary=is_first())
      )
      for line in self._introduction():
        self.report.log(line)
      stop = Stop(flag, self.run.mesh)
      while self.live:
        self._train_crew(stop)
    for member in crew:
      member.write_failure()

  def _start(self, member: Member) -> State:
    """Its state at the step where training begins: saved, or the first one."""
    if self._step:
      return member.go_back_to(self._step, self._shape)
    run, model = self.run, self.run.model
    if member.config is not run.config:
      params = start_of(model, member.config, run.mesh)
      model = model._replace(trainable=params)
    return init_state(model, run.tx, run.mesh)

  def _figures(self, member: Member) -> MetricWriter:
    return MetricWriter(
      member.folder,
      config=member.config.to_dict(),
      step=self._step,
      primary=is_first(),
      wandb=member.config.log.wandb,
    )

  def _introduction(self) -> Iterator[str]:
    yield from introduction(self.run, [m.title for m in self.live])
    if self._step:
      yield f"resumed at step {self._step} of {self.run.steps}"

  def _train_crew(self, stop: Stop) -> None:
    """Until the crew changes or nobody is left."""
    first, unread = self._step, None
    crew = self.crew
    for step, passes in crew.batches(first):
      asked = stop.ask()
      metrics = crew.step(passes)
      if step == first:
        for split in self.run.data.task.dev_splits:
          self._compile_evaluation(split)
      self._read(unread)
      unread = step + 1, metrics
      self._step = step + 1
      ends_epoch = self._step % self.run.epoch_steps == 0
      if ends_epoch or step == first or stop.answer(asked):
        self._read(unread)
        unread = None
      if step == first:
        self.report.log(
          f"first step done {time.monotonic() - self._began:.1f} s after the"
          " start"
        )
      if ends_epoch:
        self._end_epoch()
      if caught := stop.answer(asked):
        self._read(unread)
        self._stop(caught)
      if ends_epoch:
        for member in [m for m in crew.members if m.ended]:
          self.conclude(member)
      if not self.live or self.crew is not crew:
        return

  def _read(self, unread: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Wait for a step's figures; where one is not finite, a member fails."""
    if unread is None:
      return
    step, metrics = unread
    losses = []
    for member, values in self.crew.figures(metrics):
      if member in self.live and self._is_finite(member, values, step):
        member.progress["loss_sum"] += values["loss"]
        losses.append(values["loss"])
        if step % member.config.log.every == 0:
          member.figures.write(step, values)
    if losses:
      self.report.advance(step, loss=statistics.mean(losses))

  def _is_finite(
    self, member: Member, values: Mapping[str, float], step: int
  ) -> bool:
    for name, value in values.items():
      if not math.isfinite(value):
        self._fail(member, f"{name} is {value}", step)
        return False
    return True

  def _fail(self, member: Member, what: str, step: int) -> None:
    reason = (
      f"The {what} at step {step} of {self.run.steps}; the run stops here."
      f" {good_save(member.saves.latest_step)} Try, in another --workdir, lower"
      " learning rates,"
      " config.optim.grad_clip=1.0 or config.model.dtype=float32."
    )
    member.fail(reason, step=step)
    self.live.remove(member)
    if len(self._cohort) > 1:
      self.report.log(f"{member.title} failed. {reason}")

  def _end_epoch(self) -> None:
    """Evaluate, save, log; then the crew of the next epoch."""
    for member in list(self.live):
      self._evaluate_member(member)
    ran, members = self.live, self.crew.members
    self.live = [member for member in ran if not member.ended]
    if 0 < 2 * len(self.live) <= len(members):
      members = list(self.live)
    for member in ran:
      epoch = member.progress["history"][-1]
      metrics = {name: epoch[name] for name in ("score", "epoch")}
      self._save(member, members, metrics)
    self._write_failures()
    self._tell(ran)
    if members is not self.crew.members:
      states = {member: self.crew.state_of(member) for member in members}
      self.crew = Crew(self.run, members, states)

  def _evaluate_member(self, member: Member) -> None:
    run, task, step = self.run, self.run.data.task, self._step
    params = self.crew.state_of(member).params
    logits = self._logits(params, task.dev_splits)
    for split in logits.values():
      if not np.isfinite(split).all():  # the epoch's last update broke it
        self._fail(member, "dev output is nan", step)
        return
    scores = dev_scores(task, logits, run.data.tokens)
    epoch = {
      "epoch": step // run.epoch_steps,
      "step": step,
      "train_loss": member.progress["loss_sum"] / run.epoch_steps,
      "score": scores[task.metrics[0]],
      "metrics": scores,
      "collapsed": is_collapsed(task, logits),
    }
    member.progress["history"].append(epoch)
    member.progress["loss_sum"] = 0.0
    # written first: a line beyond the last save is dropped on resuming
    member.figures.write(step, {"epoch": epoch["epoch"], **scores})

  def _save(
    self,
    member: Member,
    members: Sequence[Member],
    metrics: dict[str, float] | None,
  ) -> None:
    """`members` have the slots of the step to come."""
    seconds = self._before[member] + time.monotonic() - self._started
    member.progress["seconds"] = seconds
    member.progress["members"] = len(self.crew.members)
    member.progress["crew"] = [other.own for other in members]
    state = self.crew.state_of(member)
    member.saves.save(self._step, state, member.progress, metrics)

  def _write_failures(self) -> None:
    """After the others' saves: the folders show the group at one step."""
    for member in self.crew.members:
      member.write_failure()

  def _stop(self, number: signal.Signals) -> None:
    for member in self.live:  # nothing to do where the epoch just ended
      self._save(member, self.crew.members, None)
    self._write_failures()
    raise Interrupted(
      f"Stopped by {number.name}, saved at step {self._step} of"
      f" {self.run.steps}. The same command goes on from there."
    )

  def _tell(self, ran: Sequence[Member]) -> None:
    """An epoch's line, and what the bar shows."""
    if not ran:
      return
    epochs = {member: member.progress["history"][-1] for member in ran}
    scores = [epoch["score"] for epoch in epochs.values()]
    name = self.run.data.task.metrics[0]
    shown = f"{name} {min(scores):.4f}"
    if len(self._cohort) > 1:
      shown = f"{len(self.live)} of {len(self._cohort)} train, {shown}"
      shown += f" to {max(scores):.4f}"
    self.report.show_score(shown)
    for member, epoch in epochs.items():
      self.report.log(self._epoch_line(member, epoch))

  def _epoch_line(self, member: Member, epoch: dict[str, Any]) -> str:
    whose = f"{member.title}: " if len(self._cohort) > 1 else ""
    scores = epoch["metrics"].items()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores)
    epochs = self.run.config.optim.epochs
    stalled = member.ended and epoch["epoch"] < epochs
    return (
      f"{whose}epoch {epoch['epoch']} of {epochs}: {shown}, training"
      f" loss {epoch['train_loss']:.4f}, {member.progress['seconds']:.0f} s"
      + (", collapsed to one class" if epoch["collapsed"] else "")
      + (", stopped early" if stalled else "")
    )

  def _compile_evaluation(self, split: str) -> None:
    """In the background, if it has not been begun."""
    self._programs.compile(split, partial(self._lower_evaluation, split))

  def _lower_evaluation(self, split: str) -> Any:
    data = self.run.data
    tokens, layout = data.tokens[split], data.eval_layouts[split]
    batch = sample_batch(tokens, layout, rows=layout.rows[0])
    return self._evaluate.lower(
      self._shape.params, self.run.model.frozen, put(batch, self._sharding)
    )

  def _logits(self, params: Any, splits: Iterable[str]) -> dict[str, Logits]:
    """One member at a time, by the program that a run alone has."""
    return {name: self._split_logits(params, name) for name in splits}

  def _split_logits(self, params: Any, split: str) -> Logits:
    run = self.run
    self._compile_evaluation(split)
    self._programs.wait(split)
    return split_logits(
      self._evaluate,
      params,
      run.model.frozen,
      run.data.tokens[split],
      run.data.eval_layouts[split],
      sharding=self._sharding,
    )

  def conclude(self, member: Member) -> None:
    """Answers, adapter and result of a member that has ended."""
    if not member.open:
      return
    best = best_epoch(member.progress["history"])["step"]
    params = member.saves.restore(best, self._shape)[0].params
    params = jax.jit(lambda p: p, out_shardings=self._everywhere)(params)
    if member.wants_test:
      self._predict_test(params, member.folder / SUBMISSION)
    if member.result is None:
      member.finish(self.run, params)

  def _predict_test(self, params: Any, folder: Path) -> None:
    """Answers to the unlabelled test split, as GLUE's server takes them."""
    task = self.run.data.task
    logits = self._logits(params, task.test_splits)

    def write() -> None:
      new = folder.with_name(folder.name + ".new")
      for name in task.test_splits:
        index = self.run.data.tokens[name].index
        write_submission(
          new, task, name, predictions(task, logits[name]), index
        )
      new.rename(folder)  # all files or none

    on_first(write)
