"""What a process holds while it runs, and how much more of it as time goes."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tests.growth.programs import Program, Running
from vera_jax.errors import UserError

SAMPLES = 100  # of a process
MOST = 0.01  # by which what is held may grow over the second half
PAUSE = 0.05  # seconds between two looks


class Sample(NamedTuple):
  """What a process holds when it has done so much.

  Attributes:
    done: how much.
    memory: bytes that are its own, without those of files that it maps.
    files: that it has open, sockets among them.
    threads: its number of threads.
  """

  done: int
  memory: int
  files: int
  threads: int


HELD = Sample._fields[1:]


def look(pid: int, done: int) -> Sample:
  """A sample of a process, by what Linux says of it.

  Raises:
    OSError: it has ended.
  """
  folder = Path(f"/proc/{pid}")
  fields = dict(
    line.split(":", 1) for line in (folder / "status").read_text().splitlines()
  )
  if "RssAnon" not in fields:
    raise ProcessLookupError(f"process {pid} has ended")
  memory = 1024 * int(fields["RssAnon"].split()[0])
  files = sum(1 for _ in (folder / "fd").iterdir())
  return Sample(done, memory, files, int(fields["Threads"]))


def watch(running: Running, count: int) -> list[Sample]:
  """Samples at even distances until all is done.

  Raises:
    UserError: the process ended before, with what it printed.
  """
  process, samples = running.process, list[Sample]()
  while True:
    ended = process.poll() is not None
    done = running.done()
    if done and not ended and done >= len(samples) * count / SAMPLES:
      try:
        samples.append(look(process.pid, done))
      except OSError:  # it ends at this moment
        continue
    if done >= count:
      return samples
    if ended:
      raise UserError(
        f"It ended with {process.returncode} after {done} of {count}:\n"
        f"{process.output.read_text()[-4000:]}"
      )
    time.sleep(PAUSE)


def growth(samples: Sequence[Sample], held: str) -> float:
  """By what share more is held at the end than in the middle.

  The ends are those of a straight line through the second half. Its slope is
  the median of the slopes between any two samples (Theil and Sen), which a file
  that is open at one of them doesn't move.
  """
  done = np.array([sample.done for sample in samples], float)
  values = np.array([getattr(sample, held) for sample in samples], float)
  later = done >= done[-1] / 2
  with np.errstate(invalid="ignore"):  # of the interval, when samples are equal
    line = stats.theilslopes(values[later], done[later])
  middle, end = (
    line.intercept + line.slope * x for x in (done[-1] / 2, done[-1])
  )
  return float(end / middle - 1)


def measure(folder: Path, program: Program, *, scale: float) -> dict[str, Any]:
  """A row of growth.json."""
  count = max(1, round(scale * program.number))
  folder.mkdir(parents=True)
  began = time.monotonic()
  with program.start(folder, count) as running:
    samples = watch(running, count)
  return {
    "what": program.what,
    "count": count,
    "seconds": round(time.monotonic() - began, 1),
    "growth": {held: growth(samples, held) for held in HELD},
    "samples": samples,
  }
