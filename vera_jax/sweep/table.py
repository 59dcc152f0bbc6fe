"""What a person sees of a sweep: the plan, and a live table of its runs."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.files import DATA, json_lines, open_file
from vera_jax.places import is_remote
from vera_jax.sweep import estimate
from vera_jax.sweep.estimate import Rate, span
from vera_jax.sweep.plan import (
  DONE,
  FAILED,
  NEW,
  RUNNING,
  STATES,
  UNFINISHED,
  Plan,
  SweepRun,
  Unit,
)
from vera_jax.terminal import Console

STYLES = {DONE: "green", FAILED: "bold red", RUNNING: "cyan"}
NUMBER = (int, float)
TAIL = 4096  # bytes of metrics.jsonl that are looked at


class Progress(NamedTuple):
  """From the last lines of metrics.jsonl; None where there was none yet."""

  step: int = 0
  loss: float | None = None
  score: float | None = None


def read_progress(folder: Path) -> Progress:
  """The latest step, loss, and score of an epoch."""
  try:
    file = folder / results.METRICS
    with open_file(file, inside=folder, limit=DATA) as opened:
      size = opened.seek(0, os.SEEK_END)
      opened.seek(max(0, size - TAIL))
      lines = opened.read().splitlines()
  except (OSError, UserError):
    return Progress()
  now = Progress()
  for line in json_lines(lines, nan=True):
    values = line.values
    if line.error or type(values.get("step")) is not int:
      continue  # its beginning lies before the tail, or its end is new
    now = now._replace(step=values.pop("step"))
    loss = values.get("loss")
    if isinstance(loss, NUMBER):
      now = now._replace(loss=loss)
    if values.pop("epoch", None) is not None:  # then the scores of its end
      score = next(iter(values.values()), None)
      now = now._replace(score=score if isinstance(score, NUMBER) else None)
  return now


def counts(states: Sequence[str]) -> str:
  """ "3 done, 1 failed, 8 new"."""
  numbers = Counter(states)
  return (
    ", ".join(f"{numbers[s]} {s}" for s in STATES if numbers[s]) or "no runs"
  )


def states(runs: Sequence[SweepRun]) -> list[str]:
  return [run.state for run in runs]


def seconds_left(units: Sequence[Unit], rate: Rate) -> float:
  """For the runs that are new or unfinished, unit after unit."""
  left = [
    [run.config for run in unit if run.state in (NEW, UNFINISHED)]
    for unit in units
  ]
  return sum(rate.seconds(configs) for configs in left)


def plan_table(plan: Plan, units: Sequence[Unit], rate: Rate) -> Table:
  """One row per unit: its runs, their states, the time that is left of it."""
  table = Table(
    Column("unit", justify="right"),
    *("runs", "state"),
    Column("left", justify="right"),
    title=plan.title,
    title_justify="left",
  )
  for number, unit in enumerate(units, 1):
    names = "\n".join(run.name for run in unit)
    left = seconds_left([unit], rate)
    shown = f"~{span(left)}" if left else ""
    table.add_row(str(number), names, counts(states(unit)), shown)
  return table


class LiveTable:
  """A table that is redrawn in a terminal; elsewhere one line per event."""

  def __init__(
    self, plan: Plan, units: Sequence[Unit], *, tflops: float | None = None
  ) -> None:
    """A table of a plan's runs, of which this process trains some units.

    Args:
      plan: the whole sweep.
      units: those of this process.
      tflops: the machine's speed, for the time left; unset: measured on the
        runs that are done.
    """
    self.console = Console(stderr=True)
    self._plan, self._units, self._tflops = plan, units, tflops
    self._results: dict[str, dict] = {}  # by name, so that each is read once
    self._started = time.monotonic()
    # of each run that trains: when that was first seen, and at which step
    self._seen: dict[str, tuple[float, int]] = {}
    self._live = Live(
      console=self.console,
      get_renderable=self._draw,
      # each look reads all runs' folders, and a store is slow
      refresh_per_second=0.05 if is_remote(plan.folder) else 0.5,
      transient=False,
    )

  def __enter__(self) -> "LiveTable":
    if self.console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._live.stop()

  def end(self, unit: Unit) -> None:
    """The worker has ended; the runs' folders say how it went."""
    for run in unit:
      state, text = run.state, ""
      if state == FAILED:
        text = run.failure()
      elif result := self._result(run):
        best = result["best"]
        mark = ", collapsed" if best.get("collapsed") else ""
        text = f"{result.get('score_name')} {best['score']:.4f}{mark}"
      self.say(f"{run.name}: {state} {text}".rstrip())
    left = self._seconds_left(self._rate())
    end = f", about {span(left)} left" if left else ""
    mine = [run for unit in self._units for run in unit]
    self.say(f"{counts(states(mine))}{end}")

  def say(self, text: str) -> None:
    """A line where there is no terminal, in which the table says it all."""
    if not self.console.is_terminal:
      self.console.print(text, soft_wrap=True)

  def _result(self, run: SweepRun) -> dict | None:
    """None where it has no score to be shown; a report says why."""
    if run.name not in self._results:
      with suppress(UserError):
        result = results.read(run.folder) or {}
        best = result.get("best")
        if isinstance(best, dict) and isinstance(best.get("score"), NUMBER):
          self._results[run.name] = result
    return self._results.get(run.name)

  def _rate(self) -> Rate:
    finished = filter(None, map(self._result, self._plan.runs))
    return estimate.rate(finished, self._tflops)

  def _draw(self) -> RenderableType:
    now = states(self._plan.runs)
    rate = self._rate()
    numbers = ("epoch", "loss", "score", "left")
    table = Table(
      Column("run", no_wrap=True),
      "state",
      *(Column(name, justify="right") for name in numbers),
      title=self._plan.title,
      title_justify="left",
    )

    # as many as the screen has room for: what runs, failed, or finished last
    def order(item: tuple[SweepRun, str]) -> tuple[int, float]:
      run, state = item
      place = (RUNNING, FAILED, DONE, UNFINISHED, NEW).index(state)
      if state != DONE or is_remote(run.folder):
        return place, 0.0
      return place, -(run.folder / results.FILE).stat().st_mtime

    room = max(5, self.console.height - 8)
    rows = sorted(zip(self._plan.runs, now, strict=True), key=order)
    for run, state in rows[:room]:
      epoch = loss = score = left = mark = ""
      if state == DONE and (result := self._result(run)):
        best = result["best"]
        mark = " collapsed" if best.get("collapsed") else ""
        epoch, score = f"{best.get('epoch')} best", f"{best['score']:.4f}"
      if state in (RUNNING, UNFINISHED):
        progress = read_progress(run.folder)
        epochs = run.config.optim.epochs
        part = progress.step / estimate.steps(run.config)
        epoch = f"{part * epochs:.1f} of {epochs}"
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        score = "" if progress.score is None else f"{progress.score:.4f}"
      if state == RUNNING:
        left = f"~{span(self._run_left(run, rate))}"
      shown = Text(state + mark, style=STYLES.get(state, "dim"))
      table.add_row(run.name, shown, epoch, loss, score, left)
    all_left = self._seconds_left(rate)
    elapsed = span(time.monotonic() - self._started)
    end = f"{elapsed} so far, about {span(all_left)} left here"
    return Group(table, Text(f"all: {counts(now)}; {end}"))

  def _seconds_left(self, rate: Rate) -> float:
    """For the units of this process, as many at once as train now."""
    training = []
    for unit in self._units:
      left = [self._run_left(r, rate) for r in unit if r.state == RUNNING]
      if left:
        training.append(max(left))
    all_left = sum(training) + seconds_left(self._units, rate)
    return all_left / max(1, len(training))

  def _run_left(self, run: SweepRun, rate: Rate) -> float:
    """Seconds of a run that trains, by its own speed if it has one."""
    now, step = time.monotonic(), read_progress(run.folder).step
    began, first = self._seen.setdefault(run.name, (now, step))
    trained = now - began - estimate.START
    if step > first and trained > 0:
      to_do = estimate.steps(run.config) - step
      return max(0.0, to_do * trained / (step - first))
    together = next((unit for unit in self._units if run in unit), [run])
    return max(0.0, rate.seconds(r.config for r in together) - (now - began))
