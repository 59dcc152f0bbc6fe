"""The process that trains a sweep's unit: runs that can train together.

It is a process of its own, so that a crash, or memory that isn't given back,
ends with it, and so that its progress bar doesn't disturb the sweep's table. It
reads the unit as a line of JSON from standard input. When that is closed, the
sweep wants to stop or is gone: the worker saves and stops. Exit codes: 0 done
(some runs may have failed, as their folders say), 75 stopped and saved, 1 none
of the runs could be trained.
"""

import json
import os
import select
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.locks import locked
from vera_jax.train.preemption import EXIT_CODE, Interrupted
from vera_jax.train.workdir import write_failure


def main(unit: dict[str, Any]) -> int:
  """Train what is left of a unit's runs; returns the exit code.

  Args:
    unit: {"runs": [{"config", "folder", "lock"}], "retry_failed"}.
  """
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  runs = {Path(run["lock"]): run for run in unit["runs"]}
  with locked(runs) as mine:
    left = []
    for lock in mine:
      # looked at again, for only now can no other process finish it
      folder = Path(runs[lock]["folder"])
      if (folder / results.FILE).exists():
        continue
      if unit["retry_failed"]:
        (folder / results.FAILED).unlink(missing_ok=True)
      if not (folder / results.FAILED).exists():
        left.append(runs[lock])
    return train(left) if left else 0


def leave(number: int, frame: FrameType | None) -> None:
  """SIGTERM while nothing trains: there is nothing to save."""
  del frame
  signal.signal(number, signal.SIG_IGN)  # one is enough
  raise SystemExit(EXIT_CODE)


def stop_when_closed(stdin: int) -> None:
  """Wait until standard input is closed, then send SIGTERM to ourselves.

  Unless one came before: a cluster may send it to every process of a job, and a
  run that has caught one (its handler is then the default again) would not
  survive a second.
  """
  select.select([stdin], [], [])  # nothing more is written to it
  if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
    os.kill(os.getpid(), signal.SIGTERM)


def train(runs: list[dict[str, Any]]) -> int:
  """Train them together; an error that ends all is written to each folder."""
  from vera_jax.train.ensemble import train_ensemble  # the training stack, late

  configs = [ConfigDict(run["config"]) for run in runs]
  folders = [Path(run["folder"]) for run in runs]
  try:
    train_ensemble(configs, folders)
  except Interrupted as error:
    print(error, file=sys.stderr)
    return EXIT_CODE
  except UserError as error:
    print(error, file=sys.stderr)
    with suppress(OSError):  # a full disk; the sweep sees that nothing is there
      note_failure(runs, str(error))
    return 1
  except Exception as error:  # whatever it is, the sweep goes on to the next
    traceback.print_exc()
    note_failure(runs, f"{type(error).__name__}: {error}")
    return 1
  return 0


def note_failure(runs: list[dict[str, Any]], reason: str) -> None:
  """A failed.json for each run that has neither result nor failure."""
  for run in runs:
    folder, config = Path(run["folder"]), run["config"]
    if any((folder / f).exists() for f in (results.FILE, results.FAILED)):
      continue
    folder.mkdir(parents=True, exist_ok=True)
    write_failure(folder, config, reason[:2000])


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, leave)
  given = json.loads(sys.stdin.readline())
  threading.Thread(
    target=stop_when_closed, args=[sys.stdin.fileno()], daemon=True
  ).start()
  sys.exit(main(given))
