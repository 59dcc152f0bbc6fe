"""One process at a time has a lock, on a shared file system or in a store.

A lock is a file or an object that names its owner. Only one process can create
it, and its owner renews it every few seconds. If the owner dies without
removing it, the lock becomes free: at once on the owner's own machine, where
the process can be looked up; elsewhere once it has not been renewed for `STALE`
seconds, on the clock of the file server or the store. An owner that slept for
so long may have lost it: `is_mine` tells, and is asked before each save.

There is no `flock` here, since not every cluster's file system has it. The
filelock library offers that, or a lease much like this file; but a process that
finds a dead machine's lease has to watch it for its whole duration before it
may take it, and the only way to learn whether a lease is held is to try.
"""

import errno
import json
import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import JSON, parse_json, read_bytes, write_text
from vera_jax.places import STORE, is_remote, store

log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between renewals
RECORD = {"host": str, "pid": int, "started": str, "id": str}
STALE = 180.0  # seconds without a renewal until another machine may take a lock
ANSWER = 30.0  # seconds that a store has for an answer, asked again and again


@contextmanager
def locked(paths: Iterable[Path]) -> Iterator[list[Path]]:
  """Take those of the locks that are free, until this context ends.

  Raises:
    OSError: a lock can't be written.
    UserError: what has its name is no file.
  """
  with ExitStack() as stack:
    yield [path for path in paths if stack.enter_context(_held(path))]


@contextmanager
def _held(path: Path) -> Iterator[bool]:
  """Take a lock if it is free, and renew it until this context ends."""
  lock, ended = _lock(path), threading.Event()
  record = _acquire(lock)
  if record is None:
    yield False
    return

  def renew() -> None:
    while not ended.wait(BEAT):
      with suppress(OSError):  # the server may be away for a moment
        if lock.read() == record:
          lock.renew(record)

  # each lock has its own: a store may let one wait for long
  thread = threading.Thread(target=renew, daemon=True, name=f"lock {path}")
  thread.start()
  try:
    yield True
  finally:
    ended.set()
    thread.join()
    with suppress(OSError):  # one that can't be removed is stale before long
      if lock.read() == record:  # after a long sleep it may be another's
        lock.remove()


def is_locked(path: Path) -> bool:
  """Whether a living process has the lock."""
  lock = _lock(path)
  return _is_alive(lock, lock.read())


def is_mine(path: Path) -> bool:
  """Whether this process has the lock, and has not lost it in a long sleep."""
  owner = _owner(_lock(path).read())
  return owner == {**_me(), "id": owner.get("id")}


def describe_owner(path: Path) -> str:
  """Who has the lock, for an error message: "process 12 on node3"."""
  owner = _owner(_lock(path).read())
  if not owner:
    return "a process that gave no name"
  return f"process {owner['pid']} on {owner['host'].split()[0]}"


def await_owner(path: Path) -> None:
  """Wait until a lock is free, or its owner is seen to renew it.

  The lock of a machine that was lost counts for `STALE` seconds, and another
  may be given the same command before. An owner on this machine is no reason to
  wait: whether it lives is known.
  """
  lock, age = _lock(path), -math.inf
  while _is_alive(lock, record := lock.read()) and lock.age() >= age:
    if _owner(record).get("host") == _host():
      return
    if age == -math.inf:
      log.warning(
        "%s may be that of a lost machine: %s. Waiting until it is renewed, or"
        " has not been for %.0f s.",
        *(path, describe_owner(path), STALE),
      )
    age = lock.age()
    time.sleep(1.0)


class _File:
  """A lock on a disk.

  Attributes:
    record: what its owner wrote, as last read; None if there is no lock.
  """

  record: str | None

  def __init__(self, path: Path) -> None:
    self.path = path

  def read(self) -> str | None:
    self.record = None
    try:
      data = read_bytes(self.path, inside=self.path.parent, limit=JSON)
      self.record = data.decode("utf-8", "replace")
    except UserError as error:
      nothing = (FileNotFoundError, NotADirectoryError)
      if not isinstance(error.__cause__, nothing):
        raise
    return self.record

  def age(self) -> float:
    """Seconds since it was renewed, on the clock that stamps these files."""
    try:
      renewed = self.path.stat().st_mtime
    except FileNotFoundError:
      return math.inf
    try:
      with tempfile.NamedTemporaryFile(
        dir=self.path.parent, prefix=".now-"
      ) as probe:
        return os.fstat(probe.fileno()).st_mtime - renewed
    except OSError:  # a folder that can only be read
      return time.time() - renewed

  def write(self, record: str) -> bool:
    """Make it ours, unless it is no longer as it was last read."""
    if self.record is not None:
      return self._replace(self.record, record)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with self.path.open("x", encoding="utf-8") as file:
        file.write(record)
    except FileExistsError:
      return False
    except OSError:  # a full disk: leave no lock without an owner
      self.path.unlink(missing_ok=True)
      raise
    return True

  def _replace(self, dead: str, record: str) -> bool:
    # A dead owner's lock may be replaced, but never a new lock that another
    # process has just put in its place. So replacing takes a second lock, whose
    # name belongs to this one dead owner, and then looks once more.
    name = f".{self.path.name}-{_owner(dead).get('id', 'nameless')}"
    second = _File(self.path.with_name(name))
    if not _acquire(second):
      return False
    try:
      if self.read() != dead or _is_alive(self, dead):
        return False
      write_text(self.path, record)
      return True
    finally:
      second.remove()

  def renew(self, record: str) -> None:
    del record  # it is there
    os.utime(self.path)

  def remove(self) -> None:
    self.path.unlink(missing_ok=True)


class _Object:
  """A lock in a store: an object with the owner's record in its metadata.

  Each change is made on the condition that the object's generation, which every
  write changes, is the one that was last read.
  """

  def __init__(self, path: Path) -> None:
    self.bucket, _, self.name = str(path).removeprefix(STORE).partition("/")

  def read(self) -> str | None:
    self.generation, self.seconds = "0", math.inf  # there is none
    try:
      headers, data = self._ask("GET", "b/{}/o/{}", self.bucket, self.name)
    except FileNotFoundError:
      return None
    fields = parse_json(data)
    self.generation = fields["generation"]
    renewed = datetime.fromisoformat(fields["updated"])
    now = parsedate_to_datetime(headers["Date"])  # by the same clock
    self.seconds = (now - renewed).total_seconds()
    return str(fields.get("metadata", {}).get("owner", ""))

  def age(self) -> float:
    return self.seconds

  def write(self, record: str) -> bool:
    fields = json.dumps({"name": self.name, "metadata": {"owner": record}})
    parts = ("application/json", fields), ("text/plain", record)
    text = "".join(f"--lock\nContent-Type: {x}\n\n{y}\n" for x, y in parts)
    try:
      self._ask(
        "POST",
        store().base.replace("/storage/", "/upload/storage/") + "b/{}/o",
        self.bucket,
        uploadType="multipart",
        headers={"Content-Type": "multipart/related; boundary=lock"},
        data=f"{text}--lock--".encode(),
        ifGenerationMatch=self.generation,
      )
    except FileExistsError:
      # Another was faster. Or the answer was lost, and the client asked again.
      return self.read() == record
    return True

  renew = write

  def remove(self) -> None:
    names = self.bucket, self.name
    self._ask("DELETE", "b/{}/o/{}", *names, ifGenerationMatch=self.generation)

  def _ask(self, *request: str, **options: Any) -> Any:
    """(headers, content) of the answer.

    Raises:
      FileExistsError: the condition does not hold.
      OSError: there is no such object, or the store could not be asked.
    """
    try:
      return store().call(*request, timeout=ANSWER, **options)
    except (FileExistsError, FileNotFoundError):
      raise
    except Exception as error:  # of the client, its login, the network
      reason = str(error) or type(error).__name__
      raise OSError(errno.EIO, f"the store can't be asked: {reason}") from error


def _lock(path: Path) -> _File | _Object:
  return _Object(path) if is_remote(path) else _File(path)


def _acquire(lock: _File | _Object) -> str | None:
  """Make a new lock ours; returns its record, or None if it is taken."""
  record = json.dumps({**_me(), "id": uuid.uuid4().hex})  # no other's is equal
  free = not _is_alive(lock, lock.read())
  return record if free and lock.write(record) else None


def _is_alive(lock: _File | _Object, record: str | None) -> bool:
  """Whether there is a lock, whose owner lives as far as can be known."""
  if record is None:
    return False
  owner = _owner(record)
  if owner.get("host") == _host():
    return _runs(owner["pid"], owner["started"])
  # Whose renewal lies in the future has not renewed since a clock was set back.
  return abs(lock.age()) < STALE


def _me() -> dict[str, Any]:
  pid = os.getpid()
  return {"host": _host(), "pid": pid, "started": _start_time(pid)}


def _owner(record: str | None) -> dict[str, Any]:
  """The owner of a record; {} if it is not, or not yet, written in full."""
  try:
    owner = parse_json(record or "{}")
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


def _runs(pid: int, started: str) -> bool:
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
