"""Runs a script of `experiments` as a user does, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# One process imports what takes seconds, and each command is a fork of it.
FORKS = """
import json, os, runpy, sys
import experiments.cli
import vera_jax.export.hf, vera_jax.serve.predictor, vera_jax.sweep.plan
commands, folder = json.loads(sys.argv[1]), sys.argv[2]
for number, command in enumerate(commands):
  child = os.fork()
  if not child:
    for stream in (1, 2):
      file = f"{folder}/{number}.{stream}"
      os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    sys.exit()
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(code, flush=True)  # or the next one would print it again
"""


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


def run_each(
  *commands: Sequence[Any],
) -> list[subprocess.CompletedProcess[str]]:
  """Modules with their flags, one after the other; they share their imports.

  No device is used before the forks, so that each command starts as by itself.
  """
  words = [list(map(str, command)) for command in commands]
  with tempfile.TemporaryDirectory() as folder:
    forks = subprocess.run(
      [sys.executable, "-c", FORKS, json.dumps(words), folder],
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=True,
      timeout=120 * len(words),
    )
    found = []
    for number, code in enumerate(forks.stdout.split()):
      said = (Path(folder, f"{number}.{i}").read_text() for i in (1, 2))
      found.append(subprocess.CompletedProcess(words[number], int(code), *said))
  assert len(found) == len(words), forks.stderr
  for done in found:
    assert "Traceback" not in done.stderr, done.stderr
  return found


def refused_each(script: str, code: int, *commands: Sequence[Any]) -> list[str]:
  """What each of a script's commands says that ends with `code`."""
  done = run_each(*([f"experiments.{script}", *flags] for flags in commands))
  assert [one.returncode for one in done] == [code] * len(done), done
  return [one.stderr for one in done]
