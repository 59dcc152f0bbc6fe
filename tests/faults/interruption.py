"""Signals, damaged saves, a full disk, a second run, another run's saves."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.ground import (
  Ended,
  Ground,
  Trial,
  differing,
  end,
  kill,
  last_step,
  reach,
  saves,
  wait_until,
)

EPOCH = 10  # steps
TEMPORARY = "*.orbax-checkpoint-tmp*"


def _saving(workdir: Path) -> bool:
  """Whether a save is under way, or was when the process was killed."""
  folder = workdir / "checkpoints"
  if any(folder.glob(TEMPORARY)):
    return True
  return any(
    not (folder / str(s) / "seal.json").exists() for s in saves(workdir)
  )


def _kill_once(
  process: subprocess.Popen[str],
  workdir: Path,
  rng: random.Random,
  *,
  in_save: bool,
) -> bool:
  """SIGKILL at a random moment, in a save if asked; False if it had ended."""
  goal = last_step(workdir) + rng.randint(1, 2 * EPOCH)
  ready = reach(workdir, goal, process)
  if ready and in_save:
    ready = wait_until(lambda: _saving(workdir), process)
  time.sleep(rng.uniform(0, 0.05 if in_save else 0.3))
  if not ready or process.poll() is not None:
    return False
  kill(process)
  return True


def kills(ground: Ground, alone: Path, *, times: int, seed: int = 0) -> Trial:
  """SIGKILL so often in one run, every other time in a save."""
  rng, workdir = random.Random(seed), ground.folder / "killed"
  shutil.rmtree(workdir, ignore_errors=True)
  killed = in_saves = again = 0
  while killed < times:
    process = ground.start(workdir)
    if not _kill_once(process, workdir, rng, in_save=killed % 2 == 1):
      break
    killed += 1
    in_saves += _saving(workdir)
    sealed = [s for s in saves(workdir) if _sealed(workdir, s)]
    again += last_step(workdir) - max(sealed, default=0)
  ended = ground.run(workdir)
  same = ended.code == 0 and not differing(workdir, alone)
  seen = f"{in_saves} of them in mid-save; {again} steps were done again"
  return Trial("kill -9 in one run", killed, int(not same), same, seen)


def _sealed(workdir: Path, step: int) -> bool:
  return (workdir / "checkpoints" / str(step) / "seal.json").exists()


def preemptions(
  ground: Ground, alone: Path, *, times: int, seed: int = 0
) -> Trial:
  """SIGTERM at random moments of one run."""
  rng, workdir = random.Random(seed), ground.folder / "preempted"
  shutil.rmtree(workdir, ignore_errors=True)
  tried = lost = late = 0
  for _ in range(times):
    process = ground.start(workdir)
    goal = last_step(workdir) + rng.randint(1, 2 * EPOCH)
    if not reach(workdir, goal, process):
      break
    time.sleep(rng.uniform(0, 0.2))
    before = last_step(workdir)
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    tried += 1
    lost += ended.code != 75 or saves(workdir)[-1] < last_step(workdir)
    late = max(late, saves(workdir)[-1] - before)
  done = ground.run(workdir)
  same = done.code == 0 and not differing(workdir, alone)
  seen = f"exit code 75; saved {late} steps or less after the last figures"
  return Trial("SIGTERM", tried, lost + (not same), same, seen)


def _cut(file: Path) -> None:
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])


def _flip(file: Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def _largest(save: Path, below: str) -> Path:
  files = [path for path in (save / below).rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


DAMAGES: tuple[tuple[str, str, Callable[[Path], object]], ...] = (
  ("an array file's byte flipped", "state", _flip),
  ("an array file cut in half", "state", _cut),
  ("an array file missing", "state", Path.unlink),
  ("the progress cut in half", "progress", _cut),
)


def stopped(ground: Ground, step: int) -> Path:
  """A run that SIGTERM stopped after a step; used by several trials."""
  workdir = ground.folder / "stopped"
  if not workdir.exists():
    process = ground.start(workdir)
    reach(workdir, step, process)
    process.send_signal(signal.SIGTERM)
    end(process)
  return workdir


def damages(ground: Ground, alone: Path) -> list[Trial]:
  """The newest save of a stopped run is harmed, each time otherwise."""
  trials = []
  origin = stopped(ground, EPOCH + 3)
  for number, (name, below, harm) in enumerate(DAMAGES):
    workdir = ground.folder / f"damaged-{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(origin, workdir)
    before, newest = saves(workdir)[-2:]
    file = _largest(workdir / "checkpoints" / str(newest), below)
    harm(file)
    ended = ground.run(workdir)
    told = f"save of step {newest}" in ended.told and file.name in ended.told
    resumed = f"resumed at step {before} " in ended.told
    kept = (workdir / "damaged" / str(newest)).is_dir()
    same = ended.code == 0 and not differing(workdir, alone)
    good = same and told and resumed and kept
    trials.append(
      Trial(
        f"newest save damaged: {name}",
        1,
        int(not good),
        same,
        f"step and file named, set aside; on from step {before}, not {newest}",
      )
    )
  return trials


def second_run(ground: Ground) -> Trial:
  """A second run on the workdir of one that trains."""
  workdir = ground.folder / "locked"
  shutil.rmtree(workdir, ignore_errors=True)
  first = ground.start(workdir)
  reach(workdir, 1, first)
  second = ground.run(workdir)
  refused = second.code == 1 and f"process {first.pid} on" in second.told
  first.send_signal(signal.SIGTERM)
  end(first)
  seen = "refused, with the first one's process and host"
  return Trial("second run on one workdir", 1, int(not refused), None, seen)


def other_config(ground: Ground) -> Trial:
  """Another config on a run's folder, and another run's saves in a folder."""
  workdir, mixed = stopped(ground, EPOCH + 3), ground.folder / "mixed"
  shutil.rmtree(mixed, ignore_errors=True)
  changed = ground.run(workdir, **{"vera.rank": 4})
  shutil.copytree(workdir, mixed)
  shutil.rmtree(mixed / "checkpoints")
  (mixed / "config.json").unlink()
  assert ground.run(mixed, **{"vera.rank": 4, "optim.epochs": 1}).code == 0
  (mixed / "result.json").unlink()
  shutil.rmtree(mixed / "checkpoints")
  shutil.copytree(workdir / "checkpoints", mixed / "checkpoints")
  copied = ground.run(mixed, **{"vera.rank": 4, "optim.epochs": 1})
  lost = sum(not _refused(ended) for ended in (changed, copied))
  seen = "refused: vera.rank: 8 there, 4 now"
  return Trial("checkpoint of another config", 2, lost, None, seen)


def _refused(ended: Ended) -> bool:
  return ended.code == 1 and "vera.rank: 8 there, 4 now" in ended.told


def _without_paths(ended: Ended, folder: Path) -> str:
  return ended.told.strip().splitlines()[-1].replace(f"{folder}/", "")


def full_disk(ground: Ground, alone: Path) -> Trial:
  """The workdir lies on a disk of 3 MB that fills up in the second epoch."""
  name, disk = "full disk", ground.folder / "disk"
  disk.mkdir(exist_ok=True)
  mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True).returncode != 0:
    return Trial(
      name, 0, 0, None, "not tried: mounting a small disk needs root"
    )
  try:
    return _fill_disk(ground, alone, disk)
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def _fill_disk(ground: Ground, alone: Path, disk: Path) -> Trial:
  workdir, filler = disk / "run", disk / "filler"
  process = ground.start(workdir)
  reach(workdir, EPOCH + 1, process)
  with filler.open("wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(4096))
    except OSError:
      pass
  ended = end(process)
  clear = "disk" in ended.told and "full" in ended.told
  good = ended.code == 1 and clear and "Traceback" not in ended.told
  filler.unlink()
  done = ground.run(workdir)
  same = done.code == 0 and not differing(workdir, alone)
  lost = int(not good or not same or "resumed at" not in done.told)
  return Trial("full disk", 1, lost, same, _without_paths(ended, disk))
