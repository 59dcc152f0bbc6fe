"""Ctrl-C and SIGTERM end a run after the step under way, not within it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: the same command, run again, goes on
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """The run was stopped and saved; the same command resumes it."""


class Flag:
  """The signal that came, if one did."""

  caught: signal.Signals | None = None

  def set(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.caught = signal.Signals(number)
    signal.signal(number, signal.SIG_DFL)  # a second one is not held up


@contextmanager
def watch() -> Iterator[Flag]:
  """A flag that the first SIGINT or SIGTERM sets, inside this context.

  Off the main thread Python can't watch signals; there the flag stays unset.
  A signal that the process was told to ignore (`command &` in a script does
  so with SIGINT) stays ignored.
  """
  flag = Flag()
  if threading.current_thread() is not threading.main_thread():
    yield flag
    return
  heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
  before = {number: signal.signal(number, flag.set) for number in heeded}
  try:
    yield flag
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
