"""One contender of a benchmark, in a process whose memory is its own.

Imports nothing but the standard library: torch's contenders pay for torch.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def serve(work: Callable[[Settings], dict[str, Any]]) -> None:
  """Work by the settings in one file, tell the outcome in another.

  `settings["started"]` is the time at which the process was started. `work`
  gives the time "imported", at which it had all its libraries.
  """
  asked, told = map(Path, sys.argv[1:])
  settings = json.loads(asked.read_text(encoding="utf-8"))
  outcome = work(settings)
  started = settings["started"]
  outcome["seconds"] = time.time() - started
  outcome["imports"] = outcome.pop("imported") - started
  outcome["peak_bytes"] = peak_bytes()
  told.write_text(json.dumps(outcome), encoding="utf-8")


def peak_bytes() -> int:
  """The most memory that this process ever held.

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
