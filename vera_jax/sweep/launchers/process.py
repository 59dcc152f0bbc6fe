"""A unit's worker as a child process, started on the machine that trains it."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from vera_jax.places import Mirror, is_remote, place
from vera_jax.sweep.worker import LOST, note_failure
from vera_jax.train.preemption import EXIT_CODE

WORKER = [sys.executable, "-m", "vera_jax.sweep.worker"]
POLL = 0.5  # seconds between looks at a worker
GRACE = 60.0  # seconds that a worker has for its last save
OUTLAST = 120.0  # and that it has once another host of its unit has failed


def free_port() -> int:
  """A port on which a unit's first process can listen for the others."""
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


class Worker:
  """The process that trains a unit, or one of several that do."""

  def __init__(
    self, message: dict[str, Any], first: str | None, number: int
  ) -> None:
    """Start it.

    Args:
      message: what it is to do; see `worker.main`.
      first: HOST:PORT of the first process, if there are several.
      number: of this process.
    """
    self._message, self._killed_at = message, float("inf")
    part = f".{number}" if number else ""
    self._log = log = place(f"{message['log']}{part}.log")
    self._mirror = Mirror(log.parent) if is_remote(log) else None
    if self._mirror:
      self._log = self._mirror.local / log.name
      if log.exists():
        self._log.write_bytes(log.read_bytes())
    self._log.parent.mkdir(parents=True, exist_ok=True)
    with self._log.open("a", encoding="utf-8") as file:
      self._child = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=file,
        stderr=file,
        start_new_session=True,  # Ctrl-C reaches us alone; we pass it on
      )
    assert self._child.stdin is not None
    self._stdin = self._child.stdin
    others = {"coordinator": first, "process_id": number}
    with suppress(BrokenPipeError):  # it ended at once; its exit code says how
      self._stdin.write(json.dumps(message | others).encode() + b"\n")
      self._stdin.flush()

  def stop(self) -> None:
    """Let it save and end, within `GRACE` seconds."""
    with suppress(BrokenPipeError):
      self._stdin.close()
    self.kill_in(GRACE)

  def kill_in(self, seconds: float) -> None:
    """Kill it then, unless it has ended or was to be killed before."""
    self._killed_at = min(self._killed_at, time.monotonic() + seconds)

  def has_ended(self) -> bool:
    """Looks for `POLL` seconds at most."""
    with suppress(subprocess.TimeoutExpired):
      self._child.wait(timeout=POLL)
    if time.monotonic() > self._killed_at:
      self._child.kill()
    return self._child.returncode is not None

  def has_failed(self) -> bool:
    """Whether it has ended, and not well."""
    return bool(self._child.returncode)

  def wait(self) -> int:
    """Its exit code; if it died, why is noted in the folders of its runs."""
    while not self.has_ended():
      pass
    was_stopped = self._stdin.closed
    self.stop()
    code = self._child.returncode
    lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
    if self._mirror:
      with suppress(Exception):  # of the store: what counts are the runs
        self._mirror.close()
    if code in (0, 1, EXIT_CODE) or was_stopped:
      return code
    how = f"The worker ended with exit code {code}."
    if code < 0:
      name = signal.Signals(-code).name
      memory = " (out of memory? try --members=1)" if name == "SIGKILL" else ""
      how = f"The worker was ended by {name}{memory}."
    last = "\n".join(lines[-5:])
    text = f"{how} The last lines of {self._message['log']}.log:\n{last}"
    if self._message["hosts"] > 1:  # it ends so as well if another host is lost
      print(text, file=sys.stderr)
      return LOST
    note_failure(self._message["runs"], text)
    return 1
