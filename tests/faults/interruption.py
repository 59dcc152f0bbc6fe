"""Signals, damaged saves, a full disk, a second run, another run's saves."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.fixtures import (
  NO_DISK,
  Launcher,
  Outcome,
  differing,
  fill,
  last_step,
  reach,
  saves,
  small_disk,
  wait_until,
)
from tests.faults.table import HARMED, KILLED, SAVING, TWICE
from vera_jax.train import manifest

EPOCH = 10  # steps
TEMPORARY = "*.orbax-checkpoint-tmp*"


def kills(
  launcher: Launcher, alone: Path, *, times: int, seed: int = 0
) -> Outcome:
  """SIGKILL in a save of one run and, every other time, at a random moment."""
  rng, workdir = random.Random(seed), launcher.folder / "killed"
  shutil.rmtree(workdir, ignore_errors=True)
  run = launcher.runs(workdir)[0]
  killed = in_saves = again = 0
  while killed < times:
    process = launcher.start(workdir)
    in_save = killed % 2 == 0
    goal = last_step(run) + rng.randint(1, 2 * EPOCH)
    ready = reach(run, goal, process)
    if ready and in_save:
      ready = wait_until(lambda: is_saving(run), process)
    time.sleep(rng.uniform(0, 0.05 if in_save else 0.3))
    if not ready or process.poll() is not None:
      break  # the run has ended
    process.kill_now()
    killed += 1
    in_saves += is_saving(run)
    again += last_step(run) - max(complete(run), default=0)
  ended = launcher.run(workdir)
  same = ended.code == 0 and not launcher.differing(workdir, alone)
  seen = f"{in_saves} of them in mid-save; {again} steps were done again"
  cell = launcher.name, KILLED
  fault = f"{launcher.name}: kill -9"
  return Outcome(fault, killed, int(not same), same, seen, *cell)


def complete(run: Path) -> list[int]:
  """The saves with a checksum manifest, which is written last."""
  folder = run / "checkpoints"
  found = saves(run)
  return [s for s in found if (folder / str(s) / manifest.FILE).exists()]


def is_saving(run: Path) -> bool:
  """Whether a save is under way, or was when the process was killed."""
  folder = run / "checkpoints"
  return any(folder.glob(TEMPORARY)) or complete(run) != saves(run)


def preemptions(
  launcher: Launcher,
  alone: Path,
  *,
  times: int,
  seed: int = 0,
  in_saves: bool = False,
) -> Outcome:
  """SIGTERM at random moments of one run, or in the middle of its saves."""
  rng, workdir = random.Random(seed), launcher.folder / f"preempted-{in_saves}"
  shutil.rmtree(workdir, ignore_errors=True)
  run = launcher.runs(workdir)[0]
  tried = lost = late = 0
  for _ in range(times):
    process = launcher.start(workdir)
    goal = last_step(run) + rng.randint(1, 2 * EPOCH)
    if not reach(run, goal, process):
      break
    if in_saves and not wait_until(lambda: is_saving(run), process):
      break
    time.sleep(rng.uniform(0, 0.02 if in_saves else 0.2))
    before = last_step(run)
    process.send_signal(signal.SIGTERM)
    ended = process.end()
    tried += 1
    lost += ended.code != 75 or saves(run)[-1] < last_step(run)
    late = max(late, saves(run)[-1] - before)
  done = launcher.run(workdir)
  same = done.code == 0 and not launcher.differing(workdir, alone)
  steps = "1 step" if late == 1 else f"{late} steps"
  seen = f"exit code 75; saved at most {steps} after the last logged metrics"
  cell = (launcher.name, SAVING) if in_saves else ()
  fault = f"{launcher.name}: SIGTERM{' in a save' * in_saves}"
  return Outcome(fault, tried, lost + (not same), same, seen, *cell)


def _cut(file: Path) -> None:
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])


def _flip(file: Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


DAMAGES: tuple[tuple[str, str, Callable[[Path], object]], ...] = (
  ("an array file's byte flipped", "state", _flip),
  ("an array file cut in half", "state", _cut),
  ("an array file missing", "state", Path.unlink),
  ("the progress cut in half", "progress", _cut),
)


def stopped_run(launcher: Launcher) -> Path:
  """A run that SIGTERM stopped in its second epoch; several tests use it."""
  workdir = launcher.folder / "stopped"
  if not workdir.exists():
    process = launcher.start(workdir)
    reach(launcher.runs(workdir)[0], EPOCH + 3, process)
    process.send_signal(signal.SIGTERM)
    process.end()
  return workdir


def damages(launcher: Launcher, alone: Path) -> list[Outcome]:
  """The newest save of a stopped run is damaged, each time differently."""
  outcomes = []
  for number, (name, part, damage) in enumerate(DAMAGES):
    workdir = launcher.folder / f"damaged-{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(stopped_run(launcher), workdir)
    before, newest = saves(workdir)[-2:]
    place = workdir / "checkpoints" / str(newest) / part
    files = [path for path in place.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    damage(file)
    ended = launcher.run(workdir)
    expected = f"save of step {newest}", file.name, f"resumed at step {before} "
    same = ended.code == 0 and not differing(workdir, alone)
    good = same and all(words in ended.output for words in expected)
    good = good and (workdir / "damaged" / str(newest)).is_dir()
    seen = f"step and file named, set aside; on from step {before}"
    outcomes.append(
      Outcome(
        f"newest save damaged: {name}",
        1,
        int(not good),
        same,
        f"{seen}, not {newest}",
        *(launcher.name, HARMED),
      )
    )
  return outcomes


def second_run(launcher: Launcher) -> Outcome:
  """A second run on the workdir of one that trains."""
  workdir = launcher.folder / "locked"
  shutil.rmtree(workdir, ignore_errors=True)
  first = launcher.start(workdir)
  reach(launcher.runs(workdir)[0], 1, first)
  first.send_signal(signal.SIGSTOP)  # lest it has ended before
  second = launcher.run(workdir)
  refused = second.code == 1 and f"process {first.pid} on" in second.output
  first.send_signal(signal.SIGCONT)
  first.kill_now()
  seen = "refused, with the first one's process and host"
  fault = f"{launcher.name}: a second one on its folder"
  cell = launcher.name, TWICE
  return Outcome(fault, 1, int(not refused), None, seen, *cell)


def other_config(launcher: Launcher) -> Outcome:
  """Another config on a run's folder, and another run's saves in a folder."""
  workdir, mixed = stopped_run(launcher), launcher.folder / "mixed"
  shutil.rmtree(mixed, ignore_errors=True)
  changed = launcher.run(workdir, **{"vera.rank": 4})

  # A finished run of that config gets the saves of the stopped one.
  other = {"vera.rank": 4, "optim.epochs": 1}
  assert launcher.run(mixed, **other).code == 0
  (mixed / "result.json").unlink()
  shutil.rmtree(mixed / "checkpoints")
  shutil.copytree(workdir / "checkpoints", mixed / "checkpoints")
  copied = launcher.run(mixed, **other)

  reason = "vera.rank: 8 there, 4 now"
  lost = sum(
    ended.code != 1 or reason not in ended.output for ended in (changed, copied)
  )
  seen = f"refused: {reason}"
  return Outcome("checkpoint of another config", 2, lost, None, seen)


def full_disk(launcher: Launcher, alone: Path) -> Outcome:
  """The workdir lies on a disk of 3 MB that fills up in the second epoch."""
  name = "full disk"
  with small_disk(launcher.folder, megabytes=3) as disk:
    if disk is None:
      return Outcome(name, 0, 0, None, NO_DISK)
    workdir = disk / "run"
    process = launcher.start(workdir)
    reach(workdir, EPOCH + 1, process)
    filler = fill(disk)
    ended = process.end()
    filler.unlink()
    done = launcher.run(workdir)
    same = done.code == 0 and not differing(workdir, alone)
  clear = "disk" in ended.output and "full" in ended.output
  good = ended.code == 1 and clear and "Traceback" not in ended.output
  good = good and same and "resumed at" in done.output
  seen = ended.output.strip().splitlines()[-1].replace(f"{disk}/", "")
  return Outcome(name, 1, int(not good), same, seen)
