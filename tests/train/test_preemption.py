"""The first signal is noted, the second ends the process."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vera_jax.pretrained.sharding import make_mesh
from vera_jax.train.preemption import (
  SIGNALS,
  STOPPING,
  Flag,
  Interrupted,
  Stop,
  Stopped,
  nothing_to_save,
  watch,
)
from vera_jax.train.runtime import Background


@pytest.fixture(autouse=True)
def usual_handlers():
  """The usual handlers, for a runner in the background has SIGINT ignored."""
  usual = (signal.default_int_handler, signal.SIG_DFL)
  before = [signal.signal(n, h) for n, h in zip(SIGNALS, usual, strict=True)]
  yield
  for number, handler in zip(SIGNALS, before, strict=True):
    signal.signal(number, handler)


def handlers():
  return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_the_flag(number):
  before = handlers()
  with watch() as flag:
    assert flag.caught is None
    signal.raise_signal(number)
    assert flag.caught == number
    assert signal.getsignal(number) == signal.SIG_DFL
  assert handlers() == before


def test_the_handlers_come_back_after_an_error():
  before = handlers()
  with pytest.raises(ZeroDivisionError), watch():
    raise ZeroDivisionError
  assert handlers() == before


TWICE = """
import signal
from vera_jax.train.preemption import watch
signal.signal(signal.{name}, signal.SIG_DFL)
with watch() as flag:
  signal.raise_signal(signal.{name})
  print("first", flag.caught.name, flush=True)
  signal.raise_signal(signal.{name})
  print("never reached")
"""


def test_the_second_ends_at_once():
  number = signal.SIGTERM
  done = subprocess.run(
    [sys.executable, "-c", TWICE.format(name=number.name)],
    cwd=Path(__file__).resolve().parents[2],
    capture_output=True,
    text=True,
  )
  assert done.stdout.strip() == f"first {number.name}"
  assert done.returncode == -number


BUSY = """
import ctypes, os, signal, threading, time
from vera_jax.train.preemption import watch
signal.signal(signal.SIGINT, signal.default_int_handler)
def twice():
  for _ in range(2):
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
with watch():
  threading.Thread(target=twice, daemon=True).start()
  # as in a long step: this thread is in one call, and no signal ends it
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  ctypes.CDLL(None).sleep(60)
print("never reached")
"""


def test_a_process_that_is_busy_answers_all_the_same():
  done = subprocess.run(
    [sys.executable, "-c", BUSY],
    cwd=Path(__file__).resolve().parents[2],
    capture_output=True,
    text=True,
    timeout=50,
  )
  assert done.stdout == "" and done.returncode == 128 + signal.SIGINT
  assert done.stderr == f"{STOPPING}\n"


def test_another_thread_watches_nothing():
  seen = []

  def run():
    with watch() as flag:
      seen.append((flag.caught, handlers()))

  before = handlers()
  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(None, before)]


def test_what_the_process_ignores_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with watch() as flag:
      signal.raise_signal(signal.SIGINT)
      assert flag.caught is None
  finally:
    signal.signal(signal.SIGINT, before)


def test_outside_of_training_sigterm_ends_at_once():
  before = handlers()
  with pytest.raises(Interrupted, match="SIGTERM outside of training"):
    with nothing_to_save():
      signal.raise_signal(signal.SIGTERM)
  assert handlers() == before


def test_the_watch_of_training_comes_before_it():
  with nothing_to_save():
    with watch() as flag:
      signal.raise_signal(signal.SIGTERM)
    assert flag.caught == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_what_one_process_caught_all_know(number):
  """The question that several processes ask, here of eight devices."""
  flag, mesh = Flag(), make_mesh(2, 2, 2)
  stop = Stop(flag, mesh)
  stop._alone = False
  stop.check()
  stop.check(now=True)
  flag.caught = number
  stop.check()  # the answer to the question of before
  with pytest.raises(Stopped) as stopped:
    stop.check()
  assert stopped.value.signal == number
  with pytest.raises(Stopped):
    stop.check(now=True)


def test_a_signal_ends_waiting_for_a_program():
  """As in compiling for minutes: what is saved is the state of before."""
  ended, background = threading.Event(), Background()
  background.compile("step", lambda: ended.wait(60) and None)
  with watch() as flag:
    threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
    with pytest.raises(Stopped):
      Stop(flag, make_mesh()).wait_for(background, "step")
  ended.set()
