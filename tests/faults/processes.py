"""Several processes: equal to one, stopped by one, left by one."""

import shutil
import signal
import time
from pathlib import Path

from tests.faults.ground import (
  Ground,
  Trial,
  differing,
  end,
  kill,
  lines,
  reach,
  saves,
)


def largest_difference(one: Path, two: Path) -> float:
  """Of the losses of two runs' steps; their dev scores have to be equal."""
  (a, b) = (lines(one), lines(two))
  assert [line["step"] for line in a] == [line["step"] for line in b]
  scores = [[x for x in run if "epoch" in x] for run in (a, b)]
  assert scores[0] == scores[1]
  pairs = zip(a, b, strict=True)
  return max(abs(x["loss"] - y["loss"]) for x, y in pairs if "loss" in x)


def equal_layouts(ground: Ground) -> list[Trial]:
  """Two processes of four devices, one of eight, one of one."""
  folders = {n: ground.folder / f"devices-{n}" for n in ("1", "8", "2x4")}
  codes = [ground.run(folders["1"]).code]
  codes.append(ground.run(folders["8"], devices=8).code)
  codes += [end(p).code for p in ground.start_several(folders["2x4"])]
  trials = []
  for one, two in (("2x4", "8"), ("2x4", "1")):
    gap = largest_difference(folders[one], folders[two])
    trials.append(
      Trial(
        f"devices: {one} and {two}",
        1,
        int(any(codes) or gap > 1e-5),
        gap == 0 and lines(folders[one]) == lines(folders[two]),
        f"same dev scores; losses differ by at most {gap:.1e}",
      )
    )
  return trials


def stopped_by_one(ground: Ground) -> list[Trial]:
  """SIGTERM to process 1 alone; on again as two by SLURM, and as one of one."""
  workdir, moved = ground.folder / "two", ground.folder / "moved"
  processes = ground.start_several(workdir)
  reach(workdir, 13, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stops = [end(process) for process in processes]
  kept = saves(workdir)[-1]
  told = [f"saved at step {kept} of" in stop.told for stop in stops]
  agreed = all(stop.code == 75 for stop in stops) and all(told)
  shutil.copytree(workdir, moved)
  again = [end(p) for p in ground.start_several(workdir, slurm=True)]
  whole = ground.folder / "devices-2x4"
  same = not any(e.code for e in again) and not differing(workdir, whole)
  other = ground.run(moved)
  gap = largest_difference(moved, ground.folder / "devices-1")
  return [
    Trial(
      "SIGTERM to one of two processes",
      1,
      int(not agreed or not same),
      same,
      "both save at the same step, exit code 75; resumed as SLURM starts them",
    ),
    Trial(
      "2x4 stopped, resumed on one device",
      1,
      int(other.code != 0 or gap > 1e-5),
      gap == 0,
      f"same dev scores; losses differ by at most {gap:.1e}",
    ),
  ]


def left_by_one(ground: Ground) -> list[Trial]:
  """kill -9 on one of two processes, then all are started again."""
  trials = []
  for victim in (0, 1):
    workdir = ground.folder / f"left-by-{victim}"
    processes = ground.start_several(workdir)
    reach(workdir, 13, processes[0])
    kill(processes[victim])
    started = time.monotonic()
    survivor = end(processes[1 - victim])
    seconds = time.monotonic() - started
    again = [end(p) for p in ground.start_several(workdir)]
    whole = ground.folder / "devices-2x4"
    same = not any(e.code for e in again) and not differing(workdir, whole)
    trials.append(
      Trial(
        f"kill -9 on process {victim} of two",
        1,
        int(survivor.code == 0 or not same),
        same,
        f"the other ended by itself, {seconds:.0f} s later",
      )
    )
  return trials


def no_coordinator(ground: Ground) -> Trial:
  """Process 1 of two, alone; flags that are half given."""
  workdir = ground.folder / "alone"
  flags = ["--coordinator=localhost:9", "--process_id=1"]
  half = ground.run(workdir, *flags)
  waits = ground.run(
    workdir, *flags, "--num_processes=2", "--processes_timeout=10"
  )
  lost = int(half.code != 1 or "--num_processes" not in half.told)
  lost += int(waits.code != 1 or "did not come together" not in waits.told)
  return Trial(
    "no coordinator; a flag short", 2, lost, None, "told, exit code 1"
  )
