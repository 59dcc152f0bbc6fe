"""What the benchmarks share: fair timing, and the file of the figures."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vera_jax.files import write_json
from vera_jax.places import local_place
from vera_jax.results import provenance


def interleaved(
  variants: Mapping[str, Callable[[], Any]], *, repetitions: int
) -> dict[str, list[float]]:
  """Seconds of every repetition of every variant, by turns.

  Whatever else the machine does meanwhile then affects all of them alike. What
  is compiled at a first call must have been called before.
  """
  seconds: dict[str, list[float]] = {name: [] for name in variants}
  for _ in range(repetitions):
    for name, run in variants.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def environment(name: str) -> dict[str, Any]:
  """A benchmark's command, versions and hardware; the load says what else ran.

  Call it before the measurement: the load afterwards is the benchmark's own.
  """
  made = provenance()
  for package in ("torch", "peft", "llama-cpp-py-sync"):
    try:
      made["versions"][package] = version(package)
    except PackageNotFoundError:
      made["versions"][package] = None
  words = [
    word
    for word in sys.argv[1:]
    if not word.startswith(("--out=", "--scratch="))
  ]
  cpu = platform.processor()
  if Path("/proc/cpuinfo").exists():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        cpu = line.partition(":")[2].strip()
        break
  return {
    **made,
    "command": " ".join([f"python -m benchmarks.{name}", *words]),
    "cpu": cpu,
    "cores": os.cpu_count(),
    "load_before": load(),
  }


def load() -> list[float]:
  """The machine's load averages over 1, 5 and 15 minutes."""
  return [round(average, 2) for average in os.getloadavg()]


def load_line(result: Mapping[str, Any]) -> str:
  """What a page says of the machine's load around a measurement."""
  before, after = (
    ", ".join(map(str, result[f"load_{when}"])) for when in ("before", "after")
  )
  return (
    "- load average of the machine (1, 5 and 15 minutes) before:"
    f" {before}; after: {after}"
  )


def write(name: str, result: Mapping[str, Any], *, folder: str) -> Path:
  """NAME.json in the folder, which is made when missing."""
  path = local_place(folder, "--out") / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, dict(result))
  return path
