"""One process at a time has a run, also on a shared file system.

A lock is a file that only one process can make. Its owner touches it every few
seconds. Where the owner has died without removing it, the lock is void: at once
on the owner's own machine, elsewhere once it is `STALE` seconds old by the file
server's clock. No `flock`, which not every cluster's file system has.
"""

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
  if _create(path):
    return True
  if is_held(path):
    return False
  _remove_void(path)
  return _create(path)


def _create(path: Path) -> bool:
  """Whole or not at all: a link to a file that is written already."""
  owner = {
    "host": _host(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
  }
  new = path.with_name(f".{uuid.uuid4().hex}")
  new.write_text(json.dumps(owner), encoding="utf-8")
  try:
    os.link(new, path)
  except FileExistsError:
    return False
  finally:
    new.unlink()
  return True


def _remove_void(path: Path) -> None:
  """Take the void lock away, and never another's new one."""
  aside = path.with_name(f".{uuid.uuid4().hex}")
  try:
    os.rename(path, aside)
  except FileNotFoundError:
    return
  if is_held(aside):  # another process was first and has it by now
    with suppress(FileExistsError):
      os.link(aside, path)
  aside.unlink()


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
