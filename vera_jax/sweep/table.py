"""What a person sees of a sweep: the plan, and a live table of its runs."""

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vera_jax import results
from vera_jax.sweep import estimate
from vera_jax.sweep.conduct import Watcher
from vera_jax.sweep.estimate import Rate, span
from vera_jax.sweep.plan import (
  DONE,
  FAILED,
  NEW,
  RUNNING,
  STATES,
  UNFINISHED,
  Plan,
  Planned,
  Unit,
)
from vera_jax.sweep.progress import read_progress

STYLES = {DONE: "green", FAILED: "bold red", RUNNING: "cyan"}
LEFT = (NEW, UNFINISHED)


def counts(runs: Sequence[Planned]) -> str:
  """ "3 done, 1 failed, 8 new"."""
  found = Counter(run.state for run in runs)
  return ", ".join(f"{found[s]} {s}" for s in STATES if found[s]) or "no runs"


class Finished:
  """The results of a plan's runs, as far as they are there; each read once."""

  def __init__(self, plan: Plan) -> None:
    self._plan = plan
    self._read: dict[str, dict] = {}

  def __call__(self) -> list[dict]:
    found = (self.of(run) for run in self._plan.runs)
    return [result for result in found if result is not None]

  def of(self, run: Planned) -> dict | None:
    if run.name not in self._read:
      result = results.read(run.folder)
      if result is None:
        return None
      self._read[run.name] = result
    return self._read[run.name]


def seconds_left(units: Sequence[Unit], rate: Rate) -> float:
  left = [[r.config for r in unit if r.state in LEFT] for unit in units]
  return sum(rate.seconds(configs) for configs in left)


def plan_table(plan: Plan, units: Sequence[Unit], rate: Rate) -> Table:
  """A row a unit: its runs, their states, the time that is left of it."""
  table = Table(title=plan.title, title_justify="left")
  table.add_column("unit", justify="right")
  table.add_column("runs")
  table.add_column("state")
  table.add_column("left", justify="right")
  for number, unit in enumerate(units, 1):
    names = Text("\n".join(run.name for run in unit))
    left = seconds_left([unit], rate)
    table.add_row(
      str(number), names, counts(unit), f"~{span(left)}" if left else ""
    )
  return table


class LiveTable(Watcher):
  """A table that is redrawn in a terminal; elsewhere a line an event."""

  def __init__(
    self, plan: Plan, units: Sequence[Unit], *, tflops: float | None = None
  ) -> None:
    self.console = Console(stderr=True, highlight=False)
    self._plan, self._units, self._tflops = plan, units, tflops
    self._finished = Finished(plan)
    self._mine = [run for unit in units for run in unit]
    self._started = time.monotonic()
    self._unit_started = self._started
    self._unit: Unit = []
    self._seen: dict[str, int] = {}
    self._live = Live(
      console=self.console,
      get_renderable=self._draw,
      refresh_per_second=0.5,  # each look reads all runs' folders
      transient=False,
    )

  def __enter__(self) -> "LiveTable":
    if self.console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._live.stop()

  def started(self, unit: Unit) -> None:
    self._unit, self._unit_started = unit, time.monotonic()
    self._first = {run.name: read_progress(run.folder).step for run in unit}
    self._say(f"training {', '.join(run.name for run in unit)}")

  def ended(self, unit: Unit) -> None:
    self._unit = []
    for run in unit:
      state = run.state
      told = run.failure() if state == FAILED else _score(run)
      self._say(f"{run.name}: {state} {told}".rstrip())
    left = seconds_left(self._units, self._rate())
    end = f", about {span(left)} left" if left else ""
    self._say(f"{counts(self._mine)}{end}")

  def _say(self, text: str) -> None:
    if not self.console.is_terminal:
      self.console.print(text, markup=False, soft_wrap=True)

  def _rate(self) -> Rate:
    return estimate.rate(self._finished(), self._tflops)

  def _draw(self) -> RenderableType:
    states = {run.name: run.state for run in self._plan.runs}
    rate = self._rate()
    table = Table(title=self._plan.title, title_justify="left")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("epoch", "loss", "score", "left"):
      table.add_column(name, justify="right")
    for run in self._shown(states):
      table.add_row(*self._row(run, states[run.name], rate))
    here = Counter(states.values())
    told = ", ".join(f"{here[s]} {s}" for s in STATES if here[s])
    left = self._unit_left(rate) + seconds_left(self._units, rate)
    elapsed = span(time.monotonic() - self._started)
    end = f"all: {told}; {elapsed} so far, about {span(left)} left here"
    return Group(table, Text(end))

  def _shown(self, states: dict[str, str]) -> list[Planned]:
    """As many as the screen takes: running, failed, the last finished."""
    room = max(5, self.console.height - 8)

    def when(run: Planned) -> float:
      file = run.folder / results.FILE
      return file.stat().st_mtime if file.exists() else 0.0

    runs = {
      s: [r for r in self._plan.runs if states[r.name] == s] for s in STATES
    }
    done = sorted(runs[DONE], key=when, reverse=True)
    order = [*runs[RUNNING], *runs[FAILED], *done]
    return [*order, *runs[UNFINISHED], *runs[NEW]][:room]

  def _row(self, run: Planned, state: str, rate: Rate) -> list[RenderableType]:
    name, told = Text(run.name), Text(state, style=STYLES.get(state, "dim"))
    if state == DONE:
      result = self._finished.of(run) or {}
      epoch = f"{result['best']['epoch']} best"
      score = f"{result['best']['score']:.4f}"
      mark = " collapsed" if result["best"].get("collapsed") else ""
      return [
        name,
        Text(state + mark, style=STYLES[state]),
        epoch,
        "",
        score,
        "",
      ]
    if state in (NEW, FAILED):
      return [name, told, "", "", "", ""]
    now = read_progress(run.folder)
    total = estimate.steps(run.config)
    epochs = run.config.optim.epochs
    left = ""
    if state == RUNNING and run in self._unit:
      left = f"~{span(self._unit_left(rate))}"
    return [
      name,
      told,
      f"{now.step / total * epochs:.1f} of {epochs}",
      "" if now.loss is None else f"{now.loss:.4f}",
      "" if now.score is None else f"{now.score:.4f}",
      left,
    ]

  def _unit_left(self, rate: Rate) -> float:
    """Of the unit that trains here, by its own speed once it has one."""
    if not self._unit:
      return 0.0
    passed = time.monotonic() - self._unit_started
    run = self._unit[0]
    step, first = read_progress(run.folder).step, self._first[run.name]
    total = estimate.steps(run.config)
    trained = passed - estimate.START
    if step > first and trained > 0:
      return max(0.0, (total - step) * trained / (step - first))
    return max(0.0, rate.seconds(r.config for r in self._unit) - passed)


def _score(run: Planned) -> str:
  result = results.read(run.folder)
  if result is None:
    return ""
  best = result["best"]
  mark = ", collapsed" if best.get("collapsed") else ""
  return f"{result['score_name']} {best['score']:.4f}{mark}"
