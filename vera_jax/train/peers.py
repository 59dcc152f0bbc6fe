"""What the processes of a run know of each other: who is lost, and who stopped.

A collective waits in C++, for ever, for a process that was killed, that hangs
or that has stopped with an error. So in each process a thread puts a record of
it into the store of jax's coordinator (which process 0 serves) every few
seconds, reads the others', and ends the process when one of them is lost: the
main thread could not. It exits with 75 then, since the same command goes on.

Errors are written into the run's folder, or those of all runs that train
together: errors/host3.txt is process 3's. They are kept when the run goes on,
each with its time.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vera_jax.errors import UserError
from vera_jax.hub import call_error
from vera_jax.terminal import LINES, printable
from vera_jax.train.preemption import EXIT_CODE, Interrupted

ERRORS = "errors"
BEAT = 2.0  # seconds between records
PAUSE = 4 * BEAT  # until a process without a new record is in doubt
LOST = 40.0  # until it is lost
STUCK = 40.0  # seconds for a batch that the other processes have had
_KEY = "vera_jax/peers/"
_TEXT = 2000  # characters of an error, as sent to the others
_FILE = 2**16  # and of those in a file

Item = TypeVar("Item")
_peers: "Peers | None" = None  # of this process, unless it is alone


class Peers:
  """This process among those of its run.

  Attributes:
    folders: those of the runs, once they are known.
    batch: how many batches this process has had.
    asked: since when it waits for the next, on `time.monotonic`'s clock.
  """

  def __init__(self, client: Any, number: int, processes: int) -> None:
    """Begin to watch the others.

    Args:
      client: jax's, of the coordinator.
      number: of this process.
      processes: how many there are.
    """
    self.folders: Sequence[Path] = ()
    self.batch, self.asked = 0, float("inf")
    self._client, self._number = client, number
    self._mine: dict[str, Any] = {
      "host": socket.gethostname(),
      "beat": 0,
      "code": 0,  # with which it ends, or would by itself
      "text": "see what it printed",
      "sure": False,  # that it is no consequence of another process's end
      "because": "",  # of other processes
      "gone": False,
    }
    self._records: dict[int, dict[str, Any]] = {}
    self._changed = dict.fromkeys(range(processes), time.monotonic())
    self._noticed = float("inf")  # when another was first seen to have stopped
    self._ending = threading.Lock()
    self._began = clock_ahead()
    self._traceback = ""  # of an error that another process may have caused
    # jax calls abort() as soon as its coordinator's connection closes
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    self._handler = handler  # as long as this process lives
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    threading.Thread(target=self._watch, daemon=True, name="peers").start()

  def _exchange(self) -> None:
    """Send this process's record, and take the others'."""
    self._mine["beat"] += 1
    self._mine["batch"] = self.batch
    self._mine["waits"] = max(0.0, time.monotonic() - self.asked)
    record = json.dumps(self._mine)
    self._client.key_value_set(f"{_KEY}{self._number}", record, True)
    for key, value in self._client.key_value_dir_get(_KEY):
      number, record = int(key.rpartition("/")[2]), json.loads(value)
      if record != self._records.get(number):
        self._changed[number] = time.monotonic()
      self._records[number] = record

  def _watch(self) -> None:
    while True:
      time.sleep(BEAT)
      # in a thread of its own: it never returns if process 0 hangs
      error = call_error(self._exchange, seconds=LOST)
      if not threading.main_thread().is_alive():
        return  # all have ended well
      if error is None:
        self._judge()
      elif self._silence(self._number) > LOST:
        self._lose({0: f"is lost: {error}"})

  def _silence(self, number: int) -> float:
    """Seconds since a process's record last changed."""
    return time.monotonic() - self._changed[number]

  def _judge(self) -> None:
    """End this process if one is lost, hangs or has stopped."""
    if self._ending.locked():
      return
    ended = {n for n, record in self._records.items() if record["code"]}
    # not this process: that it hangs is for the others to see and to write
    live = self._changed.keys() - ended - {self._number}
    lost = {
      n: f"is lost: there was no sign of life for {LOST:.0f} s"
      for n in live
      if self._silence(n) > LOST
    }
    most = max(record["batch"] for record in self._records.values())
    for number, record in self._records.items():
      if number in live and record["waits"] > STUCK and record["batch"] < most:
        lost[number] = f"hangs: it has waited for its data for {STUCK:.0f} s"
    if lost:
      self._lose(lost)
    if not ended:
      return
    self._noticed = min(self._noticed, time.monotonic())
    doubtful = any(self._silence(n) > PAUSE for n in live)
    # Others may have the same error to report. Or they fail for the sake of one
    # that was lost, which is known later.
    if time.monotonic() - self._noticed > PAUSE and not doubtful:
      causes = {n for n in ended if self._records[n]["sure"]} or ended
      codes = {self._records[n]["code"] for n in causes}
      reasons = [self._reason(n) for n in sorted(causes - {self._number})]
      # A process that is sure had an error of its own, or says which process
      # made it end: it may be this one, whose traceback is then needed.
      mine = self._name(self._number)
      certain = [self._records[n] for n in causes if self._records[n]["sure"]]
      if all(mine in record["because"] for record in certain):
        self._show_traceback()
      self._end(reasons, min(codes - {EXIT_CODE}, default=EXIT_CODE))

  def _reason(self, number: int) -> str:
    """Why a process ended that has said so."""
    record = self._records[number]
    return (
      record["because"] or f"{self._name(number)} stopped: {record['text']}"
    )

  def _aborted(self, signal_number: int) -> None:
    """If process 0 is there the abort, of whatever reason, goes on."""
    if not threading.main_thread().is_alive():
      return
    if self._ending.locked():
      os._exit(self._mine["code"])
    if call_error(self._exchange, seconds=BEAT):
      reason = "is lost: its connections were closed"
      # jax's coordinator subtracts times of the wall clock without a sign, and
      # so gives all processes up, whatever its patience
      if (back := self._began - clock_ahead()) > BEAT:
        reason += f", as this machine's clock was set back by {back:,.0f} s"
      self._lose({0: reason})

  def _name(self, number: int) -> str:
    host = self._records.get(number, {}).get("host", "its host is not known")
    return f"Process {number} ({host})"

  def _lose(self, lost: dict[int, str]) -> NoReturn:
    """End because of these processes; the first of the others writes why."""
    for number, reason in lost.items():
      if self._number == min(self._changed.keys() - lost.keys(), default=0):
        self.write(number, reason)
    self._end([f"{self._name(n)} {x}" for n, x in lost.items()], EXIT_CODE)

  def _end(self, reasons: list[str], code: int) -> NoReturn:
    reasons = list(dict.fromkeys(reasons))
    self._mine["because"] = " ".join(reasons)[:_TEXT]
    self._mine["sure"] = True
    _print(reasons)
    self.leave(code)

  def note(self, error: BaseException) -> None:
    """Write down the error that this process ends with, if it is one."""
    text = str(error) or type(error).__name__
    self._mine["text"] = text[:_TEXT]
    expected = isinstance(error, (UserError, OSError, Interrupted))
    self._mine["sure"] = expected or not isinstance(error, Exception)
    if not isinstance(error, Interrupted):
      lines = [text] if expected else traceback.format_exception(error)
      self.write(self._number, "".join(lines))

  def hold(self, error: Exception) -> None:
    """Keep its traceback until no other process turns out to be the cause."""
    self._traceback = "".join(traceback.format_exception(error))

  def _show_traceback(self) -> None:
    _print(self._traceback.splitlines())
    self._traceback = ""

  def write(self, number: int, text: str) -> None:
    """Add to a process's files of errors, whatever state its disk is in."""

    def add() -> None:
      for folder in self.folders:
        if not folder.exists():
          continue
        path = folder / ERRORS / f"host{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text()[-_FILE:] if path.exists() else ""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        path.write_text(f"{before}{now}, {self._name(number)}\n{text}\n\n")

    call_error(add, seconds=PAUSE)

  def leave(self, code: int) -> NoReturn:
    """End this process; the first one when the others have ended, or are lost.

    Where the error may come from the loss of another process, the thread that
    watches them decides.
    """
    main = threading.current_thread() is threading.main_thread()
    self._mine["code"] = code
    if main and not self._mine["sure"]:
      time.sleep(LOST + 2 * PAUSE)
      self._show_traceback()
    self._ending.acquire()  # and keep: one thread ends the process
    self._mine["gone"] = True
    call_error(self._exchange, seconds=PAUSE)
    if self._number == 0:
      self._outlast()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _outlast(self) -> None:
    """Wait for the others, which need the coordinator; say how they ended."""
    until = time.monotonic() + LOST
    others = sorted(self._changed.keys() - {0})
    while time.monotonic() < until and any(
      self._silence(n) < LOST / 2 and not self._records.get(n, {}).get("gone")
      for n in others
    ):
      time.sleep(BEAT / 4)
      if call_error(self._exchange, seconds=PAUSE):
        break  # jax's coordinator has ended before
    ends: dict[str, list[str]] = {}
    for number in others:
      record = self._records.get(number, {})
      if not record.get("gone"):
        end = "did not end by itself"
      elif record["because"]:
        end = "ended, too"
      elif record["text"] == self._mine["text"]:
        continue  # as this one, which has said why
      else:
        end = f"stopped: {record['text']}"
      ends.setdefault(end, []).append(self._name(number))
    lines = [f"{', '.join(names)} {end}" for end, names in ends.items()]
    if lines and self.folders:
      lines.append(f"What each had to say is in {self.folders[0] / ERRORS}.")
    _print(lines)


def clock_ahead() -> float:
  """Seconds from the clock that nobody sets to the one that shows the date."""
  return time.time() - time.monotonic()


def _print(lines: list[str]) -> None:
  if lines:
    print(printable("\n".join(lines), keep=LINES), file=sys.stderr, flush=True)


def watch_others(client: Any, number: int, processes: int) -> None:
  """Call once the processes have come together."""
  global _peers
  _peers = Peers(client, number, processes)


def leave(code: int) -> None:
  """End a process that has failed or was stopped, without waiting.

  Python's own end would wait for a program that is being compiled, and jax's
  for all other processes. So it returns only for a process that has done its
  work, or that failed alone.
  """
  if _peers is not None and code:
    _peers.leave(code)
  if code == EXIT_CODE:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hold(error: Exception) -> bool:
  """Whether there are other processes, one of which may be the cause; if so,
  `leave` shows the traceback once it is known that none is."""
  if _peers is not None:
    _peers.hold(error)
  return _peers is not None


@contextmanager
def errors_in(*folders: Path) -> Iterator[None]:
  """An error that ends this context is written to all runs' folders.

  A process that is alone has its terminal for that.
  """
  if _peers is None:
    yield
    return
  _peers.folders = folders
  try:
    yield
  except BaseException as error:
    _peers.note(error)
    raise


def read_next(batches: Iterator[Item]) -> Item:
  """The next batch; the other processes see if it does not come."""
  if _peers is None:
    return next(batches)
  _peers.asked = time.monotonic()
  batch = next(batches)
  _peers.batch, _peers.asked = _peers.batch + 1, float("inf")
  return batch
