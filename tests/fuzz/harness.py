"""A mutation tried: what its reading opened, started, took and said.

An attempt ends "fine" or "refused", by a `UserError`. All else is a finding:
another exception, a program, a connection, a file outside of the sandbox or a
device opened, or more time or memory than the limits. Python's audit events
tell of opens and programs; what Rust and C open they don't see, so the kernel
is asked as well (inotify), for the places that mutations lead to.
"""

import ctypes
import os
import random
import shutil
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.fuzz.mutations import DEVICE, harm
from tests.fuzz.readers import READERS
from vera_jax.errors import UserError

FINE, REFUSED = "fine", "refused"
SECONDS, MEMORY = 10.0, 2 * 2**30  # beyond the clean files
LONGEST = 500  # characters of an error's line, before some become escapes
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{ROOT}/vera_jax/"
FOUND = Path(__file__).with_name("found")  # by reader, and by mutation
# Where Python, its libraries, compiled programs and the kernel's figures lie.
PLACES = (
  os.environ.get("JAX_COMPILATION_CACHE_DIR", sys.prefix),
  *(sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/usr", "/lib"),
  *("/dev/null", "/dev/urandom", "/etc/localtime", "/etc/ld.so"),
)
EVENTS = (
  *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"),
  *("os.fork", "os.forkpty", "socket.connect"),
)
IN_OPEN = 0x20  # of inotify


class Attempt(NamedTuple):
  """One mutation's outcome.

  Attributes:
    number: of the mutation; -1 for the clean files.
    done: which file, and what happened to it.
    outcome: `FINE`, `REFUSED` or what was found.
    seconds: of processor time.
    memory: the peak, in bytes beyond what was there before.
  """

  number: int
  done: str
  outcome: str
  seconds: float
  memory: int

  @property
  def is_finding(self) -> bool:
    return self.outcome not in (FINE, REFUSED)


class Sandbox:
  """A reader's folders: its clean files, and others made anew each time.

  Attributes:
    seconds, memory: what reading the clean files takes.
  """

  def __init__(self, folder: Path, reader: str) -> None:
    self.name, self.reader = reader, READERS[reader]
    names = ("clean", "harmed", "outside", "home")
    self._folders = tuple(folder.resolve() / name for name in names)
    self.clean, self.harmed, self.outside, self.home = self._folders
    self.seconds, self.memory = 0.0, 0
    for made in self._folders:
      made.mkdir(parents=True)
    self.reader.write(self.clean)

  def read_clean(self) -> Attempt:
    """Read the clean files, which says what is usual."""
    self._renew()
    found = self._attempt(-1, "nothing")
    self.seconds, self.memory = found.seconds, found.memory
    return found

  def attempt(self, number: int, *, seed: int = 0) -> Attempt:
    """The files after the mutation of this number."""
    return self._attempt(number, self.harm(number, seed=seed))

  def keep(self, name: str) -> None:
    """Copy to `FOUND` the files that the last mutation has changed."""
    for file in self.harmed.rglob("*"):
      inside = file.relative_to(self.harmed)
      before = self.clean / inside
      if not (stat.S_ISREG(file.lstat().st_mode) and before.is_file()):
        continue  # what is no file, and what the reader has written
      if file.read_bytes() != before.read_bytes():
        kept = FOUND / self.name / name / inside
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, kept)

  def again(self, kept: Path) -> Attempt:
    """The files of a finding once more, which `keep` has kept."""
    self._renew()
    shutil.copytree(kept, self.harmed, dirs_exist_ok=True)
    return self._attempt(0, str(kept))

  def harm(self, number: int, *, seed: int = 0) -> str:
    """Make the folders anew, with the mutation of this number; says which."""
    self._renew()
    rng = random.Random(f"{seed} {self.name} {number}")
    return harm(self.harmed, self.reader.harmed, rng, self.outside)

  def _renew(self) -> None:
    for folder in self._folders[1:]:
      shutil.rmtree(folder, ignore_errors=True)
    for folder in (self.outside, self.home):
      folder.mkdir()
    shutil.copytree(self.clean, self.harmed)

  def _attempt(self, number: int, done: str) -> Attempt:
    # caches and temporary files lie in the sandbox too
    os.environ["HOME"] = os.environ["TMPDIR"] = str(self.home)
    tempfile.tempdir = str(self.home)
    places = [self.harmed, self.home]
    watched = [Path(DEVICE)]
    # who names a file may have it lie elsewhere
    (places if self.reader.named else watched).append(self.outside)
    opens = _Opens(watched)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _memory("VmRSS"), time.process_time()
    _watch.update(places=places, seen=[], starts=self.reader.starts)
    outcome = FINE
    try:
      self.reader.read(self.harmed)
    except UserError as error:
      outcome = REFUSED
      if (size := max(map(len, str(error).split("\n")))) > LONGEST:
        outcome = f"a line of {size:,} characters: {str(error)[:99]}"
    except BaseException as error:
      outcome = _where(error)
    finally:
      _watch["places"] = None
    seconds = time.process_time() - started
    memory = _memory("VmHWM") - before
    if seen := [*_watch["seen"], *opens.names()]:
      outcome = "; ".join(dict.fromkeys(seen))
    elif seconds > self.seconds + SECONDS and number >= 0:
      outcome = f"{seconds:.0f} seconds"
    elif memory > self.memory + MEMORY and number >= 0:
      outcome = f"{memory / 2**30:.1f} GiB"
    return Attempt(number, done, outcome, seconds, memory)


# Python's audit hooks stay for ever: there is one, and what it watches for.
_watch: dict[str, Any] = {"places": None, "seen": [], "starts": False}
# Functions of the package that have opened files, as "models/family.py:read".
callers: set[str] = set()


def _audit(event: str, args: tuple[Any, ...]) -> None:
  if _watch["places"] is None:
    return
  if event in EVENTS:
    if not (_watch["starts"] and args[0] == sys.executable):
      _watch["seen"].append(f"{event} {args[0]!r}"[:200])
  elif event == "open" and isinstance(args[0], str | bytes):
    path = os.path.realpath(os.fsdecode(args[0]))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
      code = frame.f_code
      if code.co_filename.startswith(PACKAGE):
        name = code.co_qualname.partition(".<locals>")[0]
        callers.add(f"{code.co_filename.removeprefix(PACKAGE)}:{name}")
      frame = frame.f_back
    if not path.startswith((*PLACES, *map(str, _watch["places"]))):
      _watch["seen"].append(f"open {path}")


sys.addaudithook(_audit)


class _Opens:
  """Which files of a folder, or devices, anybody opens from now on."""

  def __init__(self, places: Sequence[Path]) -> None:
    self._libc = ctypes.CDLL(None)
    self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    self._names = {
      self._libc.inotify_add_watch(self._fd, os.fsencode(place), IN_OPEN): place
      for place in places
    }

  def names(self) -> list[str]:
    """Says each once, and stops watching."""
    found = []
    try:
      events = os.read(self._fd, 2**16)
      while events:
        watch = int.from_bytes(events[:4], "little")
        size = 16 + int.from_bytes(events[12:16], "little")
        name = events[16:size].rstrip(b"\0").decode()
        if name or not self._names[watch].is_dir():  # a folder may be listed
          found.append(f"open {self._names[watch] / name}")
        events = events[size:]
    except BlockingIOError:  # there were none
      pass
    finally:
      os.close(self._fd)
    return found


def _memory(field: str) -> int:
  """Of this process, in bytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) * 1024
  raise LookupError(field)


def _where(error: BaseException) -> str:
  """An exception, and the last lines of the project that it came through."""
  frames = traceback.extract_tb(error.__traceback__)
  own = [
    f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}"
    for f in frames
    if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename
  ]
  last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
  text = " ".join(str(error).split())[:150]
  return f"{type(error).__name__}: {text} ({' < '.join(own[:-4:-1])}; {last})"
