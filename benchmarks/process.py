"""One side of a benchmark, in a process whose memory is its own.

Imports nothing but the standard library: torch's side pays for torch.
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


def converse(
  start: Callable[[Settings], tuple[dict[str, Any], Callable[..., Any]]],
) -> None:
  """Answer each line of standard input with one of standard output, in JSON.

  The first has the settings, by which `start` gives its answer and a function.
  The others are that function's arguments; answered are its result, the seconds
  that it took and the most memory so far.
  """
  requests = map(json.loads, sys.stdin)
  started, answer = start(next(requests))
  print(json.dumps(started), flush=True)
  for request in requests:
    begun = time.perf_counter()
    answers = answer(**request)
    seconds = time.perf_counter() - begun
    made = {"answers": answers, "seconds": seconds, "peak_bytes": peak_bytes()}
    print(json.dumps(made), flush=True)


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


def forget_peak() -> None:
  """Let `peak_bytes` count from now on, where the system can: on Linux."""
  try:
    Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    pass
