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
from vera_jax.results import provenance

REFERENCES = ("torch", "peft")


def interleaved(
  ways: Mapping[str, Callable[[], Any]], *, repetitions: int
) -> dict[str, list[float]]:
  """Seconds of every repetition of every way, taking turns.

  Whatever else the machine does then meets all of them alike. What is compiled
  at a first call must have been called.
  """
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(repetitions):
    for name, run in ways.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def environment(subcommand: str) -> dict[str, Any]:
  """Command, versions and hardware; the load says what else was running."""
  made = provenance()
  for name in REFERENCES:
    try:
      made["versions"][name] = version(name)
    except PackageNotFoundError:
      made["versions"][name] = None
  words = [word for word in sys.argv[1:] if not word.startswith("--out=")]
  return {
    **made,
    "command": " ".join(
      ["python -m experiments.benchmark", subcommand, *words]
    ),
    "cpu": _cpu(),
    "cores": os.cpu_count(),
    "load_before": [round(load, 2) for load in os.getloadavg()],
  }


def _cpu() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # not Linux
    return platform.processor()
  names = [line for line in lines if line.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else platform.processor()


def write(name: str, result: Mapping[str, Any], *, folder: str) -> Path:
  """NAME.json in the folder, which is made when missing."""
  path = Path(folder) / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, dict(result))
  return path
