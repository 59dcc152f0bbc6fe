"""Ctrl-C and SIGTERM end a run after the current step, not within it.

What may take long is left at once: compiling, and an evaluation, which the
resumed run makes anew. So a save is complete two steps after the signal. That
it came is said at once, whatever the process is doing.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vera_jax.errors import EXIT_CODE as EXIT_CODE
from vera_jax.errors import Interrupted as Interrupted
from vera_jax.train.runtime import Background

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
  """A signal came: what is trained is to be saved now."""

  def __init__(self, number: int) -> None:
    self.signal = signal.Signals(number)


class Flag:
  """The signal that came, if one did."""

  caught: signal.Signals | None = None

  def set(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.caught = signal.Signals(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once


def _print(text: str) -> None:
  with suppress(OSError, ValueError):  # then nobody is there to read it
    print(text, file=sys.stderr, flush=True)


@contextmanager
def answered(
  text: str, *, say: Callable[[str], None] = _print, after: float = 0.0
) -> Iterator[None]:
  """Says a text as soon as the first signal comes, inside this context.

  Python calls a signal's handler in the main thread, between two operations of
  its own; a step, or a program that is compiled, may be one for minutes.
  Another thread hears of the signal at once. It ends the process at the second
  one, where the handler of the first could not yet arrange for that.

  Args:
    text: what is said.
    say: how.
    after: seconds in which the context may end first, with nothing said.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  over = threading.Event()

  def answer() -> None:
    first = True
    while number := os.read(reader, 1):
      if number[0] not in SIGNALS:
        continue
      if not first and not over.is_set():
        os._exit(128 + number[0])
      first = False
      if not over.wait(after):
        say(text)

  thread = threading.Thread(target=answer, name="signals", daemon=True)
  thread.start()
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    over.set()
    os.close(writer)  # which ends the thread
    thread.join()
    os.close(reader)


STOPPING = (
  "Stopping after this step, and saving; again to end now, losing what came"
  " after the last save."
)


@contextmanager
def watch(
  text: str = STOPPING, say: Callable[[str], None] = _print
) -> Iterator[Flag]:
  """A flag that the first SIGINT or SIGTERM sets, inside this context.

  The text is said at once.

  Outside the main thread Python can't watch signals; there the flag stays
  unset. A signal that the process ignores (SIGINT, where a script started it as
  `command &`) stays ignored.
  """
  flag = Flag()
  if threading.current_thread() is not threading.main_thread():
    yield flag
    return
  watched = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
  before = {number: signal.signal(number, flag.set) for number in watched}
  try:
    with answered(text, say=say):
      yield flag
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextmanager
def nothing_to_save() -> Iterator[None]:
  """SIGTERM raises Interrupted at once, inside this context.

  For the time before the first step and after the last. Where "at once" takes a
  while, as in reading weights, that is said.
  """
  with answered("Stopping; again to end at once.", after=0.3), _terminable():
    yield


@contextmanager
def _terminable() -> Iterator[None]:
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
    yield  # a handler that somebody else has set stays
    return

  def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(
      f"Stopped by {signal.Signals(number).name} outside of training; what was"
      " saved is there. The same command goes on."
    )

  signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stop:
  """Whether any process has caught a signal, known to all at the same step.

  All processes must save at the same step. So each of them calls `check` ahead
  of each step, which starts a tiny program of its own with one number per
  device; its result is read at the next call, when the program has long ended,
  so that nothing waits for it. A process that is alone only looks at its flag.
  """

  def __init__(self, flag: Flag, mesh: Mesh) -> None:
    self._flag = flag
    self._alone = jax.process_count() == 1
    self._asked: jax.Array | None = None
    self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._highest = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def check(self, *, now: bool = False) -> None:
    """Every process calls this at the same points.

    Args:
      now: wait for the answer to this call's question.

    Raises:
      Stopped: by the call before this one, or now, a process had caught a
        signal. It is raised in all of them.
    """
    if self._alone:
      caught = self._flag.caught or 0
    else:
      before, self._asked = self._asked, self._ask()
      answer = self._asked if now else before
      caught = 0 if answer is None else int(answer)
    if caught:
      raise Stopped(caught)

  def _ask(self) -> jax.Array:
    caught = np.int32(self._flag.caught or 0)
    count = self._split.mesh.size
    numbers = jax.make_array_from_callback(
      (count,), self._split, lambda _: np.full(1, caught)
    )
    return self._highest(numbers)

  def wait_for(self, background: Background, program: Hashable) -> None:
    """Until a program is compiled, which may take minutes.

    Raises:
      Stopped: a signal came; the program is left to its thread.
    """
    background.wait(program, unless=lambda: self._flag.caught is not None)
    self.check(now=True)
