"""Several processes: equal to one, stopped by one, left by one."""

import shutil
import signal
import time
from pathlib import Path

from tests.faults.fixtures import (
  Launcher,
  Outcome,
  differing,
  lines,
  reach,
  saves,
)
from tests.untimed import untimed_metrics


def largest_difference(one: Path, two: Path) -> float:
  """Of the losses of two runs' steps; their dev scores have to be equal."""
  a, b = lines(one), lines(two)
  assert [line["step"] for line in a] == [line["step"] for line in b]
  scores = [[x for x in run if "epoch" in x] for run in (a, b)]
  assert scores[0] == scores[1]
  pairs = zip(a, b, strict=True)
  return max(abs(x["loss"] - y["loss"]) for x, y in pairs if "loss" in x)


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
