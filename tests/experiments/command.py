"""Runs a script of `experiments` as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(
  script: str, *flags: Any, text: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
  """`text` is the standard input. No script may end with a traceback."""
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{script}", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    input=text,
    env={**os.environ, **environment},
    timeout=120,
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


def refused(script: str, code: int, *flags: Any) -> str:
  """What is printed on standard error by a command that ends with `code`."""
  done = run(script, *flags)
  assert done.returncode == code, done
  return done.stderr
