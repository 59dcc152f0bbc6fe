"""One process at a time has a lock, also on a shared file system.

A lock is a file that names its owner. Only one process can create it, and its
owner touches it every few seconds. If the owner dies without removing it, the
lock becomes free: at once on the owner's own machine, where the process can be
looked up; elsewhere once the file has not been touched for `STALE` seconds.

There is no `flock` here, since not every cluster's file system has it. The
filelock library offers that, or a lease much like this file; but a process that
finds a dead machine's lease has to watch it for its whole duration before it
may take it, and the only way to learn whether a lease is held is to try.
"""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import JSON, parse_json, read_bytes, write_text

BEAT = 10.0  # seconds between touches
RECORD = {"host": str, "pid": int, "started": str, "id": str}
STALE = 180.0  # seconds without a touch until another machine may take a lock


@contextmanager
def locked(paths: Iterable[Path]) -> Iterator[list[Path]]:
  """Take those of the locks that are free, until this context ends.

  Raises:
    OSError: a lock's file can't be written.
    UserError: what has its name is no file.
  """
  mine: dict[Path, str] = {}
  ended = threading.Event()

  def touch() -> None:
    while not ended.wait(BEAT):
      for path in mine:
        with suppress(OSError):  # a file server may be away for a moment
          os.utime(path)

  try:
    for path in paths:
      if record := _acquire(path):
        mine[path] = record
    threading.Thread(target=touch, daemon=True, name="locks").start()
    yield list(mine)
  finally:
    ended.set()
    for path, record in mine.items():
      if _read(path) == record:  # after a long sleep it may be another's
        path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
  """Whether a living process has the lock."""
  owner = _owner(path)
  try:
    touched = path.stat().st_mtime
  except FileNotFoundError:
    return False
  if owner.get("host") == _host():
    return _is_alive(owner["pid"], owner["started"])
  return _file_server_time(path.parent) - touched < STALE


def describe_owner(path: Path) -> str:
  """Who has the lock, for an error message: "process 12 on node3"."""
  owner = _owner(path)
  if not owner:
    return "a process that gave no name"
  return f"process {owner['pid']} on {owner['host'].split()[0]}"


def _acquire(path: Path) -> str | None:
  """Make the lock ours; returns what its file says, or None if it is taken."""
  owner = {
    "host": _host(),
    "pid": os.getpid(),
    "started": _start_time(os.getpid()),
    "id": uuid.uuid4().hex,  # tells it from any other lock
  }
  record = json.dumps(owner)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    with path.open("x", encoding="utf-8") as file:
      file.write(record)
    return record
  except FileExistsError:
    pass
  except OSError:  # a full disk: leave no lock without an owner
    path.unlink(missing_ok=True)
    raise
  # A dead owner's lock may be replaced, but never a new lock that another
  # process has just put in its place. So replacing takes a second lock, whose
  # name belongs to this one dead owner, and then looks once more.
  dead = _read(path)
  if dead is None or is_locked(path):
    return None
  second = path.with_name(f".{path.name}-{_owner(path).get('id', 'nameless')}")
  if not _acquire(second):
    return None
  try:
    if _read(path) != dead or is_locked(path):
      return None
    write_text(path, record)
    return record
  finally:
    second.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
  try:
    data = read_bytes(path, inside=path.parent, limit=JSON)
  except UserError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      return None
    raise
  return data.decode("utf-8", "replace")


def _owner(path: Path) -> dict[str, Any]:
  """The owner's record; {} if it is not, or not yet, written in full."""
  try:
    owner = parse_json(_read(path) or "{}")
  except ValueError:
    return {}
  complete = (
    isinstance(owner, dict)
    and all(type(owner.get(name)) is kind for name, kind in RECORD.items())
    and 0 < owner["pid"] < 2**31
    and owner["id"].isalnum()  # it becomes part of a file's name
    and owner["host"].split()
  )
  return owner if complete else {}


def _host() -> str:
  """This machine; containers on it have processes of their own to look up."""
  try:
    namespace = os.readlink("/proc/self/ns/pid")
  except OSError:
    namespace = ""
  return f"{socket.gethostname()} {namespace}"


def _is_alive(pid: int, started: str) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # another user's
    return True
  return started == _start_time(pid)


def _start_time(pid: int) -> str:
  """Tells a process from a later one of the same number, on Linux."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if stat[0] == "Z" else stat[19]  # a zombie has ended


def _file_server_time(folder: Path) -> float:
  """The time on the clock that stamps this folder's files."""
  try:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as probe:
      return os.fstat(probe.fileno()).st_mtime
  except OSError:  # a folder that can only be read
    return time.time()
