"""When a run began, for the seconds to its first step."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()
_STARTED = 19  # starttime's place in /proc/self/stat, after "pid (name)"
_command: float | None = None  # when it was given, until a run takes it


def count_from_process_start() -> None:
  """The next run began with this process: what a script's user waited for.

  Any other, in a notebook or a script's second, begins when it is called.
  """
  global _command
  _command = time.monotonic() - since_start()


def begin() -> float:
  """When the run that calls this began, on `time.monotonic`'s clock."""
  global _command
  began, _command = _command, None
  return time.monotonic() if began is None else began


def since_start() -> float:
  """Seconds since the process was started, as Linux's /proc has it.

  Elsewhere since this module was imported, which leaves out the first imports.
  """
  try:
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
  except OSError:
    return time.monotonic() - _IMPORTED
  return uptime - int(stat[_STARTED]) / os.sysconf("SC_CLK_TCK")
