"""The process that trains a sweep's unit: runs that can train together.

A process of its own, so that a crash, or memory that isn't given back, ends
with it, and its progress bar has nobody to quarrel with. It reads the unit as a
line of JSON from standard input, and stops, saved, when that is closed: whoever
started it wants so, or is gone. Exit codes: 0 done (members may have failed,
their folders say so), 75 stopped and saved, 1 none of the runs could be
trained.
"""

import json
import os
import select
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.sweep.lock import held
from vera_jax.train.preemption import EXIT_CODE, Interrupted


def main() -> int:
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  signal.signal(signal.SIGTERM, leave)
  unit = json.loads(sys.stdin.readline())
  locks = {Path(run["lock"]): run for run in unit["runs"]}
  with held(list(locks), beat=partial(follow, sys.stdin.fileno())) as mine:
    # only now is it sure that no other process finishes them
    left = [run for run in map(locks.get, mine) if run and _is_open(run, unit)]
    return train(left) if left else 0


def leave(number: int, frame: FrameType | None) -> None:
  """SIGTERM while nothing trains: there is nothing to save."""
  del frame
  signal.signal(number, signal.SIG_IGN)  # one is enough
  raise SystemExit(EXIT_CODE)


def follow(stdin: int) -> None:
  """Once standard input is closed: SIGTERM to ourselves, if none came yet.

  A cluster may send it to every process of a job, and a run that has taken one
  (its handler is the default again) would not survive a second.
  """
  caught = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  if not caught and select.select([stdin], [], [], 0)[0]:
    os.kill(os.getpid(), signal.SIGTERM)


def _is_open(run: dict[str, Any], unit: dict[str, Any]) -> bool:
  folder = Path(run["folder"])
  if (folder / results.FILE).exists():
    return False
  failed = folder / results.FAILED
  if unit["retry_failed"]:
    failed.unlink(missing_ok=True)
  return not failed.exists()


def train(runs: list[dict[str, Any]]) -> int:
  """Train them together; what ends them all is written to each folder."""
  from vera_jax.train.loop import train_members  # the training stack, late

  configs = [ConfigDict(run["config"]) for run in runs]
  folders = [Path(run["folder"]) for run in runs]
  try:
    train_members(configs, folders)
  except Interrupted as error:
    print(error, file=sys.stderr)
    return EXIT_CODE
  except UserError as error:
    print(error, file=sys.stderr)
    note_failure(runs, str(error))
    return 1
  except Exception as error:  # whatever it is, the sweep goes on and tells
    traceback.print_exc()
    note_failure(runs, f"{type(error).__name__}: {error}")
    return 1
  return 0


def note_failure(runs: list[dict[str, Any]], reason: str) -> None:
  """A failed.json for each run that has neither result nor failure."""
  for run in runs:
    folder, config = Path(run["folder"]), run["config"]
    there = [(folder / f).exists() for f in (results.FILE, results.FAILED)]
    if any(there):
      continue
    folder.mkdir(parents=True, exist_ok=True)
    failure = {
      "task": config["task"],
      "method": config["method"],
      "seed": config["seed"],
      "step": None,
      "failed": reason[:2000],
      "config": config,
    }
    results.write(folder, failure, results.FAILED)


if __name__ == "__main__":
  sys.exit(main())
