"""Several processes: equal to one, stopped by one, left by one."""

import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.fixtures import (
  Launcher,
  Outcome,
  differing,
  lines,
  reach,
  saves,
)
from tests.faults.stores import MOST, fetch, wait_for_changes
from tests.faults.table import KILLED
from tests.store import BUCKET, Store
from tests.untimed import untimed_metrics
from vera_jax.errors import UserError

CLOSE = 1e-5  # losses of about 0.7, where sums are added in another order
ROUNDING = 1e-6  # dev scores that are losses, as shares of them


def largest_difference(one: Path, two: Path) -> float:
  """Of the losses of two runs' steps; their dev scores have to be equal.

  Those of a decoder are made from its loss, so they differ by rounding, too. A
  share of right answers that is another one differs by more than that.
  """
  a, b = lines(one), lines(two)
  assert [line["step"] for line in a] == [line["step"] for line in b]
  for x, y in zip(a, b, strict=True):
    if "epoch" in x:
      assert _is_close(x, y), (x, y)
  pairs = zip(a, b, strict=True)
  return max(abs(x["loss"] - y["loss"]) for x, y in pairs if "loss" in x)


def _is_close(one: Any, two: Any) -> bool:
  """Whether values of JSON are equal, but for the rounding of numbers."""
  if isinstance(one, dict):
    same = one.keys() == two.keys()
    return same and all(_is_close(one[name], two[name]) for name in one)
  if isinstance(one, float):
    return math.isclose(one, two, rel_tol=ROUNDING)
  return bool(one == two)


def equal_layouts(launcher: Launcher) -> list[Outcome]:
  """Two processes of four devices, one of eight, one of one."""
  folders = {n: launcher.folder / f"devices-{n}" for n in ("1", "8", "2x4")}
  ended = launcher.run_several(folders["2x4"])
  ended += [launcher.run(folders[n], devices=int(n)) for n in ("1", "8")]
  outcomes = []
  for one, two in (("2x4", "8"), ("2x4", "1")):
    gap = largest_difference(folders[one], folders[two])
    outcomes.append(
      Outcome(
        f"devices: {one} and {two}",
        1,
        int(any(e.code for e in ended) or gap > 1e-5),
        gap == 0
        and untimed_metrics(folders[one]) == untimed_metrics(folders[two]),
        f"same dev scores; losses differ by at most {gap:.1e}",
      )
    )
  return outcomes


def stopped_by_one(launcher: Launcher) -> list[Outcome]:
  """SIGTERM to process 1 alone; on again as two by SLURM, and as one of one."""
  workdir, moved = launcher.folder / "two", launcher.folder / "moved"
  processes = launcher.start_several(workdir)
  reach(workdir, 13, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stops = [process.end() for process in processes]
  message = f"saved at step {saves(workdir)[-1]} of"
  agreed = all(s.code == 75 and message in s.output for s in stops)
  shutil.copytree(workdir, moved)
  again = launcher.run_several(workdir, slurm=True)
  whole = launcher.folder / "devices-2x4"
  same = not any(e.code for e in again) and not differing(workdir, whole)
  other = launcher.run(moved)
  gap = largest_difference(moved, launcher.folder / "devices-1")
  return [
    Outcome(
      "SIGTERM to one of two processes",
      1,
      int(not agreed or not same),
      same,
      "both save at the same step, exit code 75; resumed as SLURM starts them",
    ),
    Outcome(
      "2x4 stopped, resumed on one device",
      1,
      int(other.code != 0 or gap > 1e-5),
      gap == 0,
      f"same dev scores; losses differ by at most {gap:.1e}",
    ),
  ]


def left_by_one(launcher: Launcher) -> list[Outcome]:
  """kill -9 on one of two processes, then all are started again."""
  outcomes = []
  for victim in (0, 1):
    workdir = launcher.folder / f"left-by-{victim}"
    processes = launcher.start_several(workdir)
    reach(workdir, 13, processes[0])
    processes[victim].kill_now()
    started = time.monotonic()
    survivor = processes[1 - victim].end()
    seconds = time.monotonic() - started
    again = launcher.run_several(workdir)
    whole = launcher.folder / "devices-2x4"
    same = not any(e.code for e in again) and not differing(workdir, whole)
    outcomes.append(
      Outcome(
        f"kill -9 on process {victim} of two",
        1,
        int(survivor.code == 0 or not same),
        same,
        f"the other ended by itself, {seconds:.0f} s later",
      )
    )
  return outcomes


# With how many a run of four goes on after that one of them was killed.
RESUMED = {0: (4, 2, 1), 1: (2,), 2: (1,), 3: (4,)}


def killed_hosts(
  launcher: Launcher, store: Store, *, seed: int
) -> Iterator[Outcome]:
  """kill -9 at random moments on each of four processes, in a store.

  They go on from copies of the folder on this disk.
  """
  rng, whole = random.Random(seed), launcher.folder / "whole"
  ended = launcher.run_several(whole, count=4, devices=1)
  assert not any(end.code for end in ended), ended[0].output
  for victim, counts in RESUMED.items():
    name = f"killed-{victim}"
    four = launcher.start_several(f"gs://{BUCKET}/{name}", count=4, devices=1)
    moment = rng.randint(1, MOST)
    if not wait_for_changes(store, moment, four[0]):
      raise UserError(f"The run of four ended:\n{four[0].end().output}")
    four[victim].kill_now()
    began = time.monotonic()
    others = [p.end() for n, p in enumerate(four) if n != victim]
    seconds = time.monotonic() - began
    named = [f"Process {victim} (" in end.output for end in others]
    lost = sum(end.code != 75 for end in others) + (not all(named))
    lost += seconds > 60
    copies = {
      count: fetch(store, name, launcher.folder / f"by-{count}")
      for count in counts
    }
    gaps, same = [], True
    for count, copy in copies.items():
      ends = launcher.run_several(copy, count=count, devices=1)
      lost += any(end.code for end in ends)
      if count == 4:
        same &= not differing(copy, whole)
      gaps.append(f"{largest_difference(copy, whole):.1e} by {count}")
      lost += largest_difference(copy, whole) > CLOSE
    yield Outcome(
      f"four hosts in a store: kill -9 on {victim}",
      1,
      lost + (not same),
      same if 4 in counts else None,
      f"after {moment} writes; the others name it and end with 75 within"
      f" {seconds:.0f} s; gone on with, losses differ by {', '.join(gaps)}",
      *("four", KILLED),
    )


def no_coordinator(launcher: Launcher) -> Outcome:
  """Process 1 of two, alone; flags that are half given."""
  workdir = launcher.folder / "alone"
  flags = ["--coordinator=localhost:9", "--process_id=1"]
  half = launcher.run(workdir, *flags)
  flags += ["--num_processes=2", "--processes_timeout=10"]
  waits = launcher.run(workdir, *flags)
  lost = int(half.code != 1 or "--num_processes" not in half.output)
  lost += int(waits.code != 1 or "did not come together" not in waits.output)
  return Outcome(
    "no coordinator; a flag short", 2, lost, None, "an error, exit code 1"
  )
