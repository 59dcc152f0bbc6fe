"""Scripts: flags and configs in, `vera_jax` does the work."""

import os
import signal
import sys
from types import FrameType


def end_at_once(number: int, frame: FrameType | None) -> None:
  """What Ctrl-C does until `cli.run` begins: one line, and no traceback.

  What is imported meanwhile might keep a KeyboardInterrupt to itself.
  """
  del frame
  os.write(2, b"Stopped.\n")
  os._exit(128 + number)


def let_ctrl_c_end_at_once() -> None:
  """Unless Ctrl-C is ignored, or handled by another."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)


if sys.argv[:1] == ["-m"]:  # this process is one of the scripts
  let_ctrl_c_end_at_once()
