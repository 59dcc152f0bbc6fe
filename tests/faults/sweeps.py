"""A sweep that this machine trains: sleep, stops, harm, changes, a full disk.

It has four runs, of which two train at once, and each pair has a process of its
own. All that is tried begins in the second epoch of the first pair. By submitit
each pair is a job, by Ray a task, and both run at once.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from tests.faults.engines import cluster, run_alone, unequal, watched
from tests.faults.everyday import (
  DAY,
  SECONDS,
  is_sentence,
  last_line,
  movable_clock,
  set_clock,
  short,
  with_other_texts,
)
from tests.faults.fixtures import (
  NO_DISK,
  Ended,
  Launcher,
  Outcome,
  Process,
  fill,
  last_step,
  saves,
  small_disk,
  wait_until,
)
from tests.faults.interruption import EPOCH, is_saving
from tests.faults.table import (
  CHANGED,
  CLOCK,
  HARMED,
  REMOVED,
  SAVING,
  SLEPT,
  TWICE,
)

SWEEP = "tests/faults/sweep.py:2"  # two methods, two seeds
MEMBERS = "--members=2"
SUBMITIT = ("--launcher=slurm", "--launcher_options=cluster=local")
RETRY = "--retry_failed"
# Somebody else, who may read all files and write none that are not theirs.
SOMEBODY = (
  *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
  *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


class Sweep:
  """Starts sweeps, and compares them with one left alone.

  Attributes:
    program: the column of the table: `sweep`, or what else starts the workers.
  """

  def __init__(self, launcher: Launcher, program: str) -> None:
    self.launcher, self.program = launcher, program
    self.alone = run_alone(launcher, SWEEP, members=2)
    self.flags = SUBMITIT if program == "submitit" else ()
    self.nodes: list[Any] = []  # Ray's

  @contextmanager
  def engine(self, environment: Mapping[str, str] = {}) -> Iterator[None]:
    """What starts the workers, if it has to be there before the sweep."""
    if self.program != "ray":
      yield
      return
    with (
      patch.dict(os.environ, environment),
      cluster(self.launcher, nodes=4) as (ray, nodes),
    ):
      self.flags = (
        "--launcher=ray",
        f"--launcher_options=address={ray.address}",
      )
      self.nodes = [ray.head_node, *nodes]
      yield

  def start(self, workdir: Path, *flags: str, **options: Any) -> Process:
    words = (MEMBERS, *self.flags, *flags)
    return self.launcher.start(workdir, *words, sweep=SWEEP, **options)

  def send(self, process: Process, number: signal.Signals) -> None:
    """To the sweep, its workers, and all of Ray's processes."""
    started = [
      one.process
      for node in self.nodes
      for kind in node.all_processes.values()
      for one in kind
    ]
    for root in (process, *started):
      with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(root.pid)
        for one in (parent, *parent.children(recursive=True)):
          with suppress(psutil.NoSuchProcess):
            one.send_signal(number)

  def outcome(self, kind: str, fault: str, good: bool, seen: str) -> Outcome:
    cell = (self.program, kind) if kind else ()
    title = f"{self.program}: {fault}"
    return Outcome(title, 1, int(not good), good, seen, *cell)

  def begun(self, name: str, **options: Any) -> tuple[Path, Process]:
    """A sweep whose first runs are in their second epoch."""
    workdir = self.launcher.folder / name
    process = self.start(workdir, **options)
    wait_until(lambda: bool(training(workdir)), process, every=0.01)
    return workdir, process

  def stopped(self, name: str) -> Path:
    """A copy of a sweep that SIGTERM stopped in that epoch."""
    first = self.launcher.folder / "stopped"
    if not first.exists():
      # by no launcher of ours, whose jobs would go on without it
      process = self.launcher.start(first, MEMBERS, sweep=SWEEP)
      wait_until(lambda: bool(training(first)), process, every=0.01)
      process.send_signal(signal.SIGTERM)
      process.end()
    return shutil.copytree(first, self.launcher.folder / name)

  def again(self, workdir: Path, *flags: str) -> bool:
    """Whether the same command ends as if nothing had happened."""
    ended = self.start(workdir, *flags).end()
    return self.is_whole(workdir, ended)

  def is_whole(self, workdir: Path, *ended: Ended) -> bool:
    """Whether all ended well, and the runs are those of the one left alone."""
    unlike = unequal(workdir, self.alone)
    good = not any(end.code for end in ended) and not unlike
    if not good:
      print(unlike, *(end.output[-3000:] for end in ended), sep="\n---\n")
    return good


def training(workdir: Path) -> list[Path]:
  """The runs that are in their second epoch, or further."""
  return [run for run in workdir.glob("runs/*") if last_step(run) >= EPOCH + 3]


def twice(sweep: Sweep) -> Outcome:
  """The same command twice at once."""
  workdir = sweep.launcher.folder / "twice"
  with watched(workdir) as both:
    processes = [sweep.start(workdir) for _ in range(2)]
    ended = [process.end() for process in processes]
  good = sweep.is_whole(workdir, *ended) and not both
  seen = "both end with 0; no run was trained twice at once"
  return sweep.outcome(TWICE, "the same command twice at once", good, seen)


def two_users(sweep: Sweep) -> Outcome:
  """Somebody else goes on with a sweep that isn't theirs."""
  workdir = sweep.stopped("two-users")
  home = sweep.launcher.folder / "home"
  home.mkdir()
  os.chown(home, 65534, 65534)
  ended = sweep.start(
    workdir,
    before=SOMEBODY,
    environment={
      "HOME": str(home),
      "TMPDIR": str(home),
      "JAX_COMPILATION_CACHE_DIR": str(home),
    },
  ).end()
  good = is_sentence(ended) and "Permission denied" in ended.output
  if not good:
    print(ended.output[-3000:])
  seen = f"refused: {short(last_line(ended), sweep.launcher.folder)}"
  good = good and sweep.again(workdir)
  return sweep.outcome(TWICE, "another user, who may only read", good, seen)


def asleep(sweep: Sweep) -> Outcome:
  """Stopped for longer than its lease; another machine takes over meanwhile."""
  workdir, first = sweep.begun("slept")
  sweep.send(first, signal.SIGSTOP)
  began = time.monotonic()
  # runs that are locked are left to their owner, until its lease has ended
  while True:
    second = sweep.launcher.start(
      workdir, MEMBERS, sweep=SWEEP, before=sweep.launcher.elsewhere
    ).end()
    if second.code or not unequal(workdir, sweep.alone):
      break
    time.sleep(60)
  seconds = time.monotonic() - began
  sweep.send(first, signal.SIGCONT)
  woke = first.end()
  good = sweep.is_whole(workdir, second, woke)
  return sweep.outcome(
    SLEPT,
    "asleep while another machine takes over",
    good,
    f"all was done elsewhere after {seconds:.0f} s; the sleeper woke, wrote"
    " nothing, and ended with 0",
  )


def in_a_save(sweep: Sweep) -> Outcome:
  """SIGTERM in the middle of a save."""
  workdir, process = sweep.begun("in-a-save")
  wait_until(lambda: any(map(is_saving, training(workdir))), process)
  if sweep.program == "submitit":
    jobs = psutil.Process(process.pid).children()
    tasks = [task for job in jobs for task in job.children()]
    for task in tasks:
      task.send_signal(signal.SIGTERM)
    good = sweep.is_whole(workdir, process.end())
    seen = f"{len(tasks)} jobs save and end; they are started again"
    return sweep.outcome(SAVING, "SIGTERM in a save", good, seen)
  process.send_signal(signal.SIGTERM)
  ended = process.end()
  good = ended.code == 75
  steps = sorted({saves(run)[-1] for run in training(workdir)})
  seen = (
    f"its runs save at step {steps[-1]}, exit code 75; the same command goes"
  )
  if not good:
    print(ended.output[-3000:])
  good = good and sweep.again(workdir)
  return sweep.outcome(SAVING, "SIGTERM in a save", good, f"{seen} on")


def harmed(sweep: Sweep) -> Outcome:
  """A file of a run's newest save is cut."""
  workdir = sweep.stopped("harmed")
  run = training(workdir)[0]
  before, newest = saves(run)[-2:]
  save = run / "checkpoints" / str(newest)
  file = max(save.rglob("*"), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-2])
  good = sweep.again(workdir) and (run / "damaged" / str(newest)).is_dir()
  seen = f"the save is set aside; on from step {before}"
  return sweep.outcome(HARMED, "a harmed save of a run", good, seen)


def changed(sweep: Sweep) -> Iterator[Outcome]:
  """Words of the data, or a bit of the base; then all is as before."""
  folder = sweep.launcher.folder
  train, weights = (
    folder / "data/train.tsv",
    folder / "encoder/model.safetensors",
  )
  for file, what, said in (
    (train, "the data", "data have changed"),
    (weights, "the base", "have changed since"),
  ):
    workdir = sweep.stopped(f"changed-{file.name}")
    before = file.read_bytes()
    other = before[:-2] + bytes([before[-2] ^ 1]) + before[-1:]
    file.write_bytes(with_other_texts(before) if file == train else other)
    ended = sweep.start(workdir).end()
    file.write_bytes(before)
    good = is_sentence(ended) and said in ended.output
    if not good:
      print(ended.output[-3000:])
    good = good and sweep.again(workdir, RETRY)
    seen = f"refused until the file was put back, by all runs: {what} changed"
    yield sweep.outcome(
      CHANGED, f"{what} changed before it goes on", good, seen
    )


def clock(sweep: Sweep) -> Iterator[Outcome]:
  """The clock of the sweep and of its workers jumps."""
  if not shutil.which("cc"):
    return
  with (
    movable_clock(sweep.launcher.folder / "clock") as (jump, environment),
    sweep.engine(environment),
  ):
    for name, seconds in (("forward", DAY), ("back", -DAY)):
      set_clock(jump, 0)
      workdir, process = sweep.begun(f"clock-{name}", environment=environment)
      set_clock(jump, seconds)
      good = sweep.is_whole(workdir, process.end())
      yield sweep.outcome(
        CLOCK, f"the clock jumps a day {name}", good, "it goes on"
      )


def removed(sweep: Sweep) -> Iterator[Outcome]:
  """What a sweep has beside its runs, the first run, and all of it."""
  for what in ("locks", "logs", "sweep.json", "a run", "its folder"):
    workdir, process = sweep.begun(f"removed-{what}".replace(" ", "-"))
    targets = {"a run": training(workdir)[0], "its folder": workdir}
    target = targets.get(what, workdir / what)
    sweep.send(process, signal.SIGSTOP)
    away = sweep.launcher.folder / "away"
    target.rename(away)
    began = time.monotonic()
    sweep.send(process, signal.SIGCONT)
    ended = process.end()
    seconds = time.monotonic() - began
    shutil.rmtree(away) if away.is_dir() else away.unlink()
    good = ended.code == 0 or (is_sentence(ended) and seconds < SECONDS)
    if not good:
      print(ended.code, seconds, ended.output[-3000:])
    seen = "it goes on"
    if ended.code or unequal(workdir, sweep.alone):
      line = short(last_line(ended), sweep.launcher.folder)
      seen = f"{line} The same command went on"
      good = good and sweep.again(workdir, RETRY)
    yield sweep.outcome(REMOVED, f"{what} removed", good, seen)


def full_disk(sweep: Sweep) -> Outcome:
  """Its folder is on a disk that fills up."""
  with small_disk(sweep.launcher.folder, megabytes=6) as disk:
    if disk is None:
      return Outcome("sweep: full disk", 0, 0, None, NO_DISK)
    workdir, process = sweep.begun("disk/sweep")
    filler = fill(disk)
    ended = process.end()
    filler.unlink()
    lines = ended.output.strip().splitlines()
    good = is_sentence(ended) and "disk" in lines[-1]
    if not good:
      print(ended.output[-3000:])
    good = good and sweep.again(workdir)
  seen = short(lines[-1], sweep.launcher.folder)
  return sweep.outcome("", "full disk", good, seen)


def troubles(launcher: Launcher, program: str) -> Iterator[Outcome]:
  """All of these."""
  sweep = Sweep(launcher, program)
  with sweep.engine():
    yield twice(sweep)
    yield two_users(sweep)
    yield in_a_save(sweep)
    yield harmed(sweep)
    yield full_disk(sweep)
    yield from removed(sweep)
    yield from changed(sweep)
    yield asleep(sweep)
  yield from clock(sweep)
