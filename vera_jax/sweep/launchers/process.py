"""A unit's worker as a child process, started on the machine that trains it."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vera_jax.sweep.plan import Unit
from vera_jax.sweep.worker import LOST, note_failure
from vera_jax.train.preemption import EXIT_CODE

WORKER = [sys.executable, "-m", "vera_jax.sweep.worker"]
POLL = 0.5  # seconds between looks at a worker
GRACE = 60.0  # seconds that a worker has for its last save


def task_of(
  unit: Unit,
  *,
  logs: Path,
  retry_failed: bool,
  patience: float = 0.0,
  hosts: int = 1,
) -> dict[str, Any]:
  """What a unit's worker is told, in values that JSON has; see `worker.main`.

  Args:
    unit: runs that train together.
    logs: a folder for what the worker prints.
    retry_failed: whether failed runs are tried again.
    patience: seconds to wait for runs that another process has.
    hosts: the number of processes that train the unit.
  """
  runs = [
    {
      # as JSON reads it back, for `note_failure` writes it too
      "config": json.loads(json.dumps(run.config.to_dict())),
      "folder": str(run.folder),
      "lock": str(run.lock),
    }
    for run in unit
  ]
  return {
    "runs": runs,
    "log": str(logs / unit[0].name),
    "retry_failed": retry_failed,
    "patience": patience,
    "hosts": hosts,
  }


def free_port() -> int:
  """A port on which a unit's first process can listen for the others."""
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


class Worker:
  """The process that trains a unit, or one of several that do."""

  def __init__(
    self, task: dict[str, Any], coordinator: str | None = None, number: int = 0
  ) -> None:
    """Start it.

    Args:
      task: as `task_of` makes it.
      coordinator: HOST:PORT of the first process, if there are several.
      number: of this process.
    """
    self._task, self._killed_at = task, float("inf")
    part = f".{number}" if number else ""
    self._log = Path(f"{task['log']}{part}.log")
    self._log.parent.mkdir(parents=True, exist_ok=True)
    with self._log.open("a", encoding="utf-8") as file:
      self._child = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=file,
        stderr=file,
        start_new_session=True,  # Ctrl-C reaches us alone; we pass it on
      )
    others = {"coordinator": coordinator, "process_id": number}
    assert self._child.stdin is not None
    with suppress(BrokenPipeError):  # it ended at once; its exit code says how
      self._child.stdin.write(json.dumps(task | others).encode() + b"\n")
      self._child.stdin.flush()

  def stop(self) -> None:
    """Let it save and end, within `GRACE` seconds."""
    stdin = self._child.stdin
    if stdin is not None and not stdin.closed:
      with suppress(BrokenPipeError):
        stdin.close()
      self._killed_at = time.monotonic() + GRACE

  def has_ended(self) -> bool:
    """Looks for `POLL` seconds at most."""
    with suppress(subprocess.TimeoutExpired):
      self._child.wait(timeout=POLL)
    if time.monotonic() > self._killed_at:
      self._child.kill()
    return self._child.returncode is not None

  def wait(self) -> int:
    """Its exit code; if it died, why is noted in the folders of its runs."""
    while not self.has_ended():
      pass
    was_stopped = self._killed_at < float("inf")
    self.stop()
    code = self._child.returncode
    if code in (0, 1, EXIT_CODE) or was_stopped:
      return code
    how = f"The worker ended with exit code {code}."
    if code < 0:
      name = signal.Signals(-code).name
      memory = " (out of memory? try --members=1)" if name == "SIGKILL" else ""
      how = f"The worker was ended by {name}{memory}."
    lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = "\n".join(lines[-5:])
    text = f"{how} The last lines of {self._log}:\n{last}"
    if self._task["hosts"] > 1:  # it ends so as well if another host is lost
      print(text, file=sys.stderr)
      return LOST
    note_failure(self._task["runs"], text)
    return 1
