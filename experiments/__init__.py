"""Scripts: flags and configs in, `vera_jax` does the work."""

import os
import signal
import sys
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
  """What Ctrl-C does: KeyboardInterrupt, or the end in the middle of an import
  and where no `cli.exit_code` catches that exception yet, or any more.

  A library that is being loaded might keep the exception to itself, or crash.
  """
  while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
    if frame.f_code.co_name == "exit_code":
      raise KeyboardInterrupt
    frame = frame.f_back
  os.write(2, b"Stopped.\n")
  os._exit(128 + number)


def handle_ctrl_c() -> None:
  """By `interrupt`, unless Ctrl-C is ignored, or handled by another."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)


if sys.argv[:1] == ["-m"]:  # this process is one of the scripts
  handle_ctrl_c()
