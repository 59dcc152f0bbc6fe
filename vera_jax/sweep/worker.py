"""The process that trains a sweep's unit: runs that can train together.

It is a process of its own, so that a crash, or memory that isn't given back,
ends with it, and so that its progress bar doesn't disturb the sweep's table. It
reads the unit as a line of JSON from standard input. When that is closed, the
sweep wants to stop or is gone: the worker saves and stops. Several workers on
as many hosts can train one unit. Exit codes: 0 done (some runs may have failed,
as their folders say, or another process has them), 75 stopped and saved, 1 none
of the runs could be trained, 76 the unit is to be tried again: a lock was lost
to another process, or one of several hosts.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.locks import is_locked, locked
from vera_jax.places import place
from vera_jax.train import distributed, peers
from vera_jax.train.preemption import EXIT_CODE, Interrupted
from vera_jax.train.workdir import (
  DiskFull,
  LockLost,
  StoreLost,
  write_failure,
)

LOST = 76  # an exit code: the unit is to be tried again


def main(task: dict[str, Any]) -> int:
  """Train what is left of a unit's runs; returns the exit code.

  Args:
    task: {"runs": [{"config", "folder", "lock"}], "inputs": the sweep's folder
      of checksums of what its runs read, "members": how many of them train at
      once, "retry_failed", "patience": seconds to wait for runs that another
      process has, "hosts": how many train them together, and if several:
      "coordinator", "process_id"}.
  """
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  hosts = task["hosts"]
  if hosts > 1:
    try:
      distributed.initialize(task["coordinator"], hosts, task["process_id"])
    except UserError as error:  # another host did not come
      print(error, file=sys.stderr)
      return LOST
  runs = {place(run["lock"]): run for run in task["runs"]}
  left: list[dict[str, Any]] = []
  with ExitStack() as stack:

    def take() -> None:
      # An engine may start a unit again before the locks of a lost machine
      # are free, or while its worker saves.
      until = time.monotonic() + task["patience"]
      while time.monotonic() < until and any(map(is_locked, runs)):
        time.sleep(1.0)
      for lock in stack.enter_context(locked(runs)):
        # looked at again, for only now can no other process finish it
        folder = place(runs[lock]["folder"])
        if (folder / results.FILE).exists():
          continue
        if task["retry_failed"]:
          (folder / results.FAILED).unlink(missing_ok=True)
        if not (folder / results.FAILED).exists():
          left.append(runs[lock])

    distributed.on_first(take)
    if hosts > 1:  # the first process took the locks for all
      from jax.experimental import multihost_utils

      taken = np.array([run in left for run in task["runs"]])
      taken = multihost_utils.broadcast_one_to_all(taken)
      left = [run for run, i in zip(task["runs"], taken, strict=True) if i]
    return train(left, task) if left else 0


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


def train(runs: list[dict[str, Any]], task: dict[str, Any]) -> int:
  """Train them; an error that ends all is written to each folder."""
  from vera_jax.train.ensemble import train_ensemble  # the training stack, late

  configs = [ConfigDict(run["config"]) for run in runs]
  folders = [place(run["folder"]) for run in runs]
  try:
    train_ensemble(
      configs,
      folders,
      members=task["members"],
      inputs=place(task["inputs"]),
    )
  except Interrupted as error:
    print(error, file=sys.stderr)
    return EXIT_CODE
  except (LockLost, StoreLost) as error:  # it can go on, here or elsewhere
    print(error, file=sys.stderr)
    return LOST
  except DiskFull as error:  # no run's failure: the same command goes on
    print(error, file=sys.stderr)
    return 1
  except UserError as error:
    print(error, file=sys.stderr)
    with suppress(OSError):  # a full disk; the sweep sees that nothing is there
      note_failure(runs, str(error))
    return 1
  except Exception as error:  # whatever it is, the sweep goes on to the next
    traceback.print_exc()
    if task["hosts"] > 1:
      return LOST  # perhaps another host is: that is no run's failure
    note_failure(runs, f"{type(error).__name__}: {error}")
    return 1
  return 0


def note_failure(runs: list[dict[str, Any]], reason: str) -> None:
  """A failed.json for each run that has neither result nor failure."""
  for run in runs:
    folder, config = place(run["folder"]), run["config"]
    if any((folder / f).exists() for f in (results.FILE, results.FAILED)):
      continue
    folder.mkdir(parents=True, exist_ok=True)
    write_failure(folder, config, reason[:2000], primary=distributed.is_first())


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, leave)
  task = json.loads(sys.stdin.readline())
  threading.Thread(
    target=stop_when_closed, args=[sys.stdin.fileno()], daemon=True
  ).start()
  code = main(task)
  peers.leave(code)
  sys.exit(code)
