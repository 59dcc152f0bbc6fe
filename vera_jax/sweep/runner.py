"""Start a worker for each unit, one after another, and tell how it goes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.sweep.plan import DONE, FAILED, RUNNING, Planned, Unit
from vera_jax.sweep.worker import note_failure
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted, watch

WORKER = [sys.executable, "-m", "vera_jax.sweep.worker"]
POLL = 0.5  # seconds between looks at the worker
GRACE = 60.0  # seconds that a worker is given for its save
SAME = 3  # units that fail alike from the start: so would the rest


class Watcher:
  """What `conduct` tells; the live table is one."""

  def started(self, unit: Unit) -> None:
    """A worker was started for these runs."""

  def tick(self) -> None:
    """Called every `POLL` seconds."""

  def ended(self, unit: Unit) -> None:
    """The worker is gone; the runs' folders say what became of them."""


def conduct(
  units: Sequence[Unit],
  *,
  logs: Path,
  retry_failed: bool = False,
  watcher: Watcher | None = None,
) -> None:
  """Train what is not done yet, unit by unit.

  Runs that another process has are left to it. A run that fails leaves the
  others alone.

  Raises:
    Interrupted: after Ctrl-C or SIGTERM, once the running unit is saved.
    UserError: the first units failed without a step and for the same reason.
  """
  watcher = watcher or Watcher()
  reasons: list[str] = []
  with watch() as flag:
    for unit in units:
      left = [run for run in unit if _is_left(run, retry_failed)]
      if not left:
        continue
      watcher.started(left)
      code = _train(left, logs, retry_failed, flag, watcher.tick)
      watcher.ended(left)
      if flag.caught or code == EXIT_CODE:
        name = flag.caught.name if flag.caught else "a signal"
        raise Interrupted(
          f"Stopped by {name}, all runs saved. The same command goes on."
        )
      reasons.append(_common_failure(left) if code == 1 else "")
      if len(reasons) == SAME and reasons[0] and len(set(reasons)) == 1:
        raise UserError(
          f"The first {SAME} units failed alike: {reasons[0]}\nMend that and"
          " give the same command with --retry_failed."
        )


def _is_left(run: Planned, retry_failed: bool) -> bool:
  state = run.state
  return state not in (DONE, RUNNING) and (state != FAILED or retry_failed)


def _common_failure(unit: Unit) -> str:
  reasons = {run.failure() for run in unit if run.state == FAILED}
  return reasons.pop() if len(reasons) == 1 else ""


def _train(
  unit: Unit,
  logs: Path,
  retry_failed: bool,
  flag: Flag,
  tick: Callable[[], None],
) -> int:
  """The worker's exit code."""
  runs = [_as_json(run) for run in unit]
  logs.mkdir(parents=True, exist_ok=True)
  log = logs / f"{unit[0].name}.log"
  with log.open("a", encoding="utf-8") as file:
    worker = subprocess.Popen(
      WORKER,
      stdin=subprocess.PIPE,
      stdout=file,
      stderr=file,
      start_new_session=True,  # Ctrl-C comes to us, and from us to it
    )
    assert worker.stdin is not None
    told = json.dumps({"runs": runs, "retry_failed": retry_failed})
    with suppress(BrokenPipeError):  # it ended at once; its exit code tells
      worker.stdin.write(told.encode() + b"\n")
      worker.stdin.flush()
    code = _wait(worker, flag, tick)
    with suppress(BrokenPipeError):
      worker.stdin.close()
  if code not in (0, 1, EXIT_CODE) and not flag.caught:
    note_failure(runs, f"{_end(code)} The last lines of {log}:\n{_last(log)}")
    return 1
  return code


def _as_json(run: Planned) -> dict[str, Any]:
  return {
    "config": json.loads(json.dumps(run.config.to_dict())),
    "folder": str(run.folder),
    "lock": str(run.lock),
  }


def _wait(
  worker: subprocess.Popen, flag: Flag, tick: Callable[[], None]
) -> int:
  asked: float | None = None
  while True:
    try:
      return worker.wait(timeout=POLL)
    except subprocess.TimeoutExpired:
      tick()
    if flag.caught and asked is None:
      assert worker.stdin is not None
      worker.stdin.close()  # it stops and saves
      asked = time.monotonic()
    if asked is not None and time.monotonic() - asked > GRACE:
      worker.kill()


def _end(code: int) -> str:
  if code >= 0:
    return f"The worker ended with exit code {code}."
  name = signal.Signals(-code).name
  memory = " (out of memory? try --members=1)" if name == "SIGKILL" else ""
  return f"The worker was ended by {name}{memory}."


def _last(log: Path, lines: int = 5) -> str:
  text = log.read_text(encoding="utf-8", errors="replace")
  return "\n".join(text.splitlines()[-lines:])
