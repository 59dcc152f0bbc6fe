"""One process at a time has a run, also on a shared file system.

A lock is a file that only one process can make. Its owner touches it every few
seconds. Where the owner has died without removing it, the lock is void: at once
on the owner's own machine, elsewhere once it is `STALE` seconds old by the file
server's clock. No `flock`, which not every cluster's file system has.
"""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 10.0  # seconds between touches
STALE = 180.0


def is_held(path: Path) -> bool:
  """Whether a living process has the lock."""
  try:
    owner = json.loads(path.read_text(encoding="utf-8"))
    touched = path.stat().st_mtime
  except FileNotFoundError:
    return False
  if owner["host"] == _host():
    return _alive(owner)
  return _now(path.parent) - touched < STALE


def _host() -> str:
  """This machine, and where there are containers this one's processes."""
  try:
    space = os.readlink("/proc/self/ns/pid")
  except OSError:
    space = ""
  return f"{socket.gethostname()} {space}"


def _alive(owner: dict) -> bool:
  try:
    os.kill(owner["pid"], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return owner.get("started") == _started(owner["pid"])


def _started(pid: int) -> str:
  """Tells a process from a later one of the same number, under Linux."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  fields = stat.rpartition(")")[2].split()
  return "" if fields[0] == "Z" else fields[19]


def _now(folder: Path) -> float:
  """The time by the clock that stamps this folder's files."""
  try:
    probe = folder / f".now-{uuid.uuid4().hex}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
  except OSError:  # a folder that can only be read
    return time.time()
  return now


def acquire(path: Path) -> bool:
  """Make the lock ours; False where another process has it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f".{uuid.uuid4().hex}")
  owner = {
    "host": _host(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "lock": new.name,  # tells it from any other lock
  }
  new.write_text(json.dumps(owner), encoding="utf-8")
  try:
    os.link(new, path)  # whole or not at all
    return True
  except FileExistsError:
    return _replace_void(path, new)
  finally:
    new.unlink(missing_ok=True)


def _replace_void(path: Path, new: Path) -> bool:
  """Put ours in the place of a void lock, and never of another's new one.

  Whoever has the claim on this very lock does so, and nobody else.
  """
  void = _text(path)
  if not void or is_held(path):
    return False
  claim = path.with_name(f".{hashlib.sha256(void.encode()).hexdigest()}")
  if not acquire(claim):
    return False
  try:
    if _text(path) != void:  # replaced before the claim was ours
      return False
    os.replace(new, path)
    return True
  finally:
    claim.unlink()


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except FileNotFoundError:
    return ""


@contextmanager
def held(
  paths: list[Path], *, beat: Callable[[], None] = lambda: None
) -> Iterator[list[Path]]:
  """Those of the locks that could be had, until this context ends.

  `beat` is called with each touch, from a thread of its own.
  """
  mine = [path for path in paths if acquire(path)]
  stop = threading.Event()
  thread = threading.Thread(
    target=_keep, args=(mine, stop, beat), daemon=True, name="locks"
  )
  thread.start()
  try:
    yield mine
  finally:
    stop.set()
    thread.join()
    for path in mine:
      path.unlink(missing_ok=True)


def _keep(
  paths: list[Path], stop: threading.Event, beat: Callable[[], None]
) -> None:
  touched = time.monotonic()
  while not stop.wait(1.0):
    beat()
    if time.monotonic() - touched < BEAT:
      continue
    touched = time.monotonic()
    for path in paths:
      with suppress(FileNotFoundError):
        os.utime(path)
