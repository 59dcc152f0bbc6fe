"""What happens to files, clocks and processes while nobody looks.

Sleep for longer than a lease, a clock that jumps, files that are removed,
harmed or changed, other numbers of processes: each on any program that trains.
"""

import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.fixtures import (
  Ended,
  Launcher,
  Outcome,
  reach,
  saves,
)
from tests.faults.interruption import EPOCH, stopped_run
from tests.faults.processes import CLOSE, largest_difference
from tests.faults.table import (
  CHANGED,
  CLOCK,
  HARMED,
  REMOVED,
  RESIZED,
  SLEPT,
)
from vera_jax.train.checkpoint import Checkpoints
from vera_jax.train.manifest import find_damage

DAY = 86_400
SECONDS = 60  # until a sentence
PLACES = 10  # of each file of a save
ADAPTER = "adapter/adapter.safetensors"
# The clock that a process sees, moved by the seconds in a file.
CLOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long *jump;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void start(void) {
  int file = open(getenv("CLOCK_JUMP"), O_RDONLY);
  jump = mmap(0, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
}
int clock_gettime(clockid_t id, struct timespec *now) {
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(id, now);
  if (!failed && jump && id == CLOCK_REALTIME) now->tv_sec += *jump;
  return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}
"""


def last_line(ended: Ended) -> str:
  """The error's sentence."""
  return ended.output.strip().splitlines()[-1]


def is_sentence(ended: Ended) -> bool:
  """Whether it ended with an error for a person, and not with a traceback."""
  return ended.code == 1 and "Traceback" not in ended.output


def same_adapters(launcher: Launcher, one: Path, two: Path) -> bool:
  pairs = zip(launcher.runs(one), launcher.runs(two), strict=True)
  return all(
    (a / ADAPTER).read_bytes() == (b / ADAPTER).read_bytes() for a, b in pairs
  )


def copied(launcher: Launcher, name: str) -> Path:
  """A copy of the run that was stopped in its second epoch."""
  workdir = launcher.folder / name
  shutil.rmtree(workdir, ignore_errors=True)
  return shutil.copytree(stopped_run(launcher), workdir)


def sleep(launcher: Launcher, alone: Path) -> Outcome:
  """Stopped for longer than its lease; another machine takes over meanwhile."""
  workdir = launcher.folder / "slept"
  first = launcher.start(workdir)
  reach(launcher.runs(workdir)[0], EPOCH + 3, first)
  first.send_signal(signal.SIGSTOP)
  began = time.monotonic()
  second = launcher.run(workdir, before=launcher.elsewhere)
  waited = time.monotonic() - began
  first.send_signal(signal.SIGCONT)
  woken, woke = time.monotonic(), first.end()
  took = time.monotonic() - woken
  good = is_sentence(woke) and "lost its lock" in woke.output
  good &= second.code == 0 and "may be that of a lost machine" in second.output
  same = second.code == 0 and not launcher.differing(workdir, alone)
  return Outcome(
    f"{launcher.name}: asleep while another machine takes over",
    1,
    int(not (good and same and took < SECONDS)),
    same,
    f"it was done elsewhere after {waited:.0f} s; the sleeper ended with 1,"
    f" {took:.0f} s after it woke, and wrote nothing",
    *(launcher.name, SLEPT),
  )


def harmed(
  launcher: Launcher, alone: Path, *, seed: int = 0
) -> Iterator[Outcome]:
  """Bits of each file of the newest save; then the run goes on."""
  rng, workdir = random.Random(seed), copied(launcher, "harmed")
  run = launcher.runs(workdir)[0]
  before, newest = saves(run)[-2:]
  save = run / "checkpoints" / str(newest)
  files = [file for file in sorted(save.rglob("*")) if file.is_file()]
  tried = unseen = 0
  for file in files:
    data = file.read_bytes()
    for place in rng.sample(range(len(data)), min(PLACES, len(data))):
      bits = bytearray(data)
      bits[place] ^= 1 << rng.randrange(8)
      file.write_bytes(bits)
      tried += 1
      unseen += find_damage(save) is None
    file.write_bytes(data[:-2])  # the last one may be a line's end
    tried += 1
    unseen += find_damage(save) is None
    copy = launcher.folder / "harmed-copy"
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    with Checkpoints(copy / "checkpoints") as found:
      unseen += found.latest_step != before
    shutil.rmtree(copy)
    file.write_bytes(data)
  (whole,) = {find_damage(save)}
  yield Outcome(
    f"{launcher.name}: a bit flipped, or the end lost, in a save",
    tried,
    unseen + (whole is not None),
    None,
    f"each of {len(files)} files in up to {PLACES} places: found, and step"
    f" {before} taken, not {newest}",
    *(launcher.name, HARMED),
  )
  file = rng.choice([file for file in files if file.stat().st_size])
  file.write_bytes(file.read_bytes()[:-2])
  ended = launcher.run(workdir)
  same = ended.code == 0 and not launcher.differing(workdir, alone)
  good = same and f"save of step {newest}" in ended.output
  yield Outcome(
    f"{launcher.name}: goes on from a harmed save",
    1,
    int(not good),
    same,
    f"the save is named and set aside; on from step {before}",
    *(launcher.name, HARMED),
  )


def with_other_texts(rows: bytes) -> bytes:
  """A file of training data, of which each row has another word."""
  head, *rest = rows.splitlines(keepends=True)
  if b"\t" not in head:
    return rows.replace(b"word3 ", b"word4 ")
  cells = [row.split(b"\t", 2) for row in rest]
  return head + b"".join(b"\t".join([a, b + b" a", c]) for a, b, c in cells)


def changed(launcher: Launcher, alone: Path) -> Outcome:
  """Words of the data, then a bit of the base; then both are as before."""
  workdir = copied(launcher, "changed")
  data = launcher.folder / "data"
  train = data / f"train.{'jsonl' if launcher.name == 'decoder' else 'tsv'}"
  weights = Path(launcher.settings["model.name"]) / "model.safetensors"
  lost = 0
  for file, what in ((train, "data have changed"), (weights, "weights in")):
    before = file.read_bytes()
    other = before[:-2] + bytes([before[-2] ^ 1]) + before[-1:]
    file.write_bytes(with_other_texts(before) if file == train else other)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = launcher.run(workdir)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime - began.ru_utime  # it starts, beside other work
    file.write_bytes(before)
    lost += not is_sentence(ended) or what not in ended.output
    lost += seconds > SECONDS
  done = launcher.run(workdir)
  same = done.code == 0 and not launcher.differing(workdir, alone)
  return Outcome(
    f"{launcher.name}: data, then the base changed before it goes on",
    2,
    lost + (not same),
    same,
    "refused until the files were put back: the data have changed; the weights"
    " have changed",
    *(launcher.name, CHANGED),
  )


@contextmanager
def movable_clock(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
  """(file with the seconds, environment) of processes whose clock jumps."""
  folder.mkdir(exist_ok=True)
  source, library = folder / "clock.c", folder / "clock.so"
  source.write_text(CLOCKS)
  build = ["cc", "-shared", "-fPIC", "-o"]
  build += [str(library), str(source), "-ldl"]
  subprocess.run(build, check=True)
  jump = folder / "jump"
  jump.write_bytes(struct.pack("l", 0))
  yield jump, {"LD_PRELOAD": str(library), "CLOCK_JUMP": str(jump)}


def set_clock(jump: Path, seconds: int) -> None:
  """In place: processes have the file mapped."""
  with jump.open("r+b") as file:
    file.write(struct.pack("l", seconds))


def clock(launcher: Launcher, alone: Path) -> Iterator[Outcome]:
  """A day forward, and a day back, in the second epoch."""
  if not shutil.which("cc"):
    seen = "not tried: there is no C compiler"
    yield Outcome(f"{launcher.name}: the clock", 0, 0, None, seen)
    return
  with movable_clock(launcher.folder / "clock") as (jump, environment):
    for name, seconds in (("forward", DAY), ("back", -DAY)):
      workdir = launcher.folder / f"clock-{name}"
      set_clock(jump, 0)
      process = launcher.start(workdir, environment=environment)
      reach(launcher.runs(workdir)[0], EPOCH + 3, process)
      set_clock(jump, seconds)
      ended = process.end()
      same = ended.code == 0 and not launcher.differing(workdir, alone)
      yield Outcome(
        f"{launcher.name}: the clock jumps a day {name}",
        1,
        int(not same),
        same,
        "it goes on",
        *(launcher.name, CLOCK),
      )


def removed(launcher: Launcher, alone: Path) -> Iterator[Outcome]:
  """Each thing that a run reads or writes, in its second epoch.

  Either the run ends as if nothing had happened, or with a sentence; then the
  same command, with what was read put back, ends with the same adapter.
  """
  model = Path(launcher.settings["model.name"])
  read = {
    "the base": model,
    "the data": launcher.folder / "data",
    "the kept tokens": launcher.folder / "tokens",
  }
  written = ("checkpoints", "metrics.jsonl", "config.json", "tensorboard")
  for what in (*read, *written, "lock", "its folder"):
    workdir = launcher.folder / f"removed-{what}".replace(" ", "-")
    run = launcher.runs(workdir)[0]
    process = launcher.start(workdir)
    reach(run, EPOCH + 3, process)
    process.send_signal(signal.SIGSTOP)
    away = launcher.folder / "away"
    target = read.get(what, run if what == "its folder" else run / what)
    target.rename(away)
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    ended = process.end()
    seconds = time.monotonic() - began
    if what in read and not target.exists():
      away.rename(target)
    elif away.is_dir():
      shutil.rmtree(away)
    else:
      away.unlink(missing_ok=True)
    lost = ended.code != 0 and not is_sentence(ended)
    lost |= ended.code != 0 and seconds > SECONDS
    seen = "it goes on"
    if ended.code:
      seen = f"{short(last_line(ended), launcher.folder)} Then it went on"
      again = launcher.run(workdir)
      lost |= again.code != 0
    same = not lost and same_adapters(launcher, workdir, alone)
    if lost:
      print(ended.output[-3000:])
    yield Outcome(
      f"{launcher.name}: {what} removed",
      1,
      int(not same),
      same,
      seen,
      *(launcher.name, REMOVED),
    )


def short(text: str, folder: Path) -> str:
  return text.replace(f"{folder}{os.sep}", "").replace("|", "/")


def resized(
  launcher: Launcher, alone: Path, *, counts: tuple[int, ...] = (4, 2)
) -> Outcome:
  """A run that one process began goes on with several, without dropout."""
  gaps, lost = [], 0
  for count in counts:
    workdir = copied(launcher, f"by-{count}")
    ends = launcher.run_several(workdir, count=count, devices=1)
    if any(end.code for end in ends):
      print(ends[0].output[-3000:])
      lost += 1
      continue
    pairs = zip(launcher.runs(workdir), launcher.runs(alone), strict=True)
    gap = max(largest_difference(*pair) for pair in pairs)
    lost += gap > CLOSE
    gaps.append(f"{gap:.1e} by {count}")
  return Outcome(
    f"{launcher.name}: goes on with several processes",
    len(counts),
    lost,
    None,
    f"losses differ by {', '.join(gaps)}",
    *(launcher.name, RESIZED),
  )
