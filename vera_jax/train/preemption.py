"""Ctrl-C and SIGTERM end a run after the current step, not within it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vera_jax.train.distributed import are_several

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
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once


@contextmanager
def watch() -> Iterator[Flag]:
  """A flag that the first SIGINT or SIGTERM sets, inside this context.

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
    yield flag
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextmanager
def nothing_to_save() -> Iterator[None]:
  """SIGTERM raises Interrupted at once, inside this context.

  For the time before the first step and after the last.
  """
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

  All processes must save at the same step. So each step `ask` starts a tiny
  program of its own, with one number per device, ahead of the step's program;
  `answer` reads its result when the step before is done, so that nothing waits
  for it. A process that is alone only looks at its flag.
  """

  def __init__(self, flag: Flag, mesh: Mesh) -> None:
    self._flag = flag
    self._alone = not are_several()
    self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._highest = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )

  def ask(self) -> jax.Array | None:
    """Start the question; every process calls this at the same step."""
    if self._alone:
      return None
    caught = np.int32(self._flag.caught or 0)
    count = self._split.mesh.size
    numbers = jax.make_array_from_callback(
      (count,), self._split, lambda _: np.full(1, caught)
    )
    return self._highest(numbers)

  def answer(self, asked: jax.Array | None) -> signal.Signals | None:
    """The signal that one of the processes had caught, or None."""
    if asked is None:
      return self._flag.caught
    number = int(asked)
    return signal.Signals(number) if number else None
