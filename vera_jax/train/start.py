"""How long ago this process was started."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()
_STARTED = 19  # starttime's place in /proc/self/stat, after "pid (name)"


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
