"""One trainer of `benchmarks.train`, in a process whose memory is its own.

Imports nothing but the standard library: torch's trainers pay for torch.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def serve(train: Callable[[Settings], dict[str, Any]]) -> None:
  """Train by the settings in one file, write the outcome to another.

  `settings["started"]` is the time at which the process was started. `train`
  gives the time "imported", at which it had all its libraries.
  """
  request, answer = map(Path, sys.argv[1:])
  settings = json.loads(request.read_text(encoding="utf-8"))
  outcome = train(settings)
  outcome["seconds"] = time.time() - settings["started"]
  outcome["imports"] = outcome.pop("imported") - settings["started"]
  outcome["peak_bytes"] = peak_bytes()
  answer.write_text(json.dumps(outcome), encoding="utf-8")


def peak_bytes() -> int:
  """The most memory that this process ever had.

  Not by getrusage where there is /proc: a child's figure starts there with
  the memory of the process that started it.
  """
  try:
    lines = Path("/proc/self/status").read_text().splitlines()
  except OSError:  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
  high = next(line for line in lines if line.startswith("VmHWM"))
  return int(high.split()[1]) * 1024
