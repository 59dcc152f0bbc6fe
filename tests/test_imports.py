"""Libraries that stay out of a command, though they are installed."""

import os
import subprocess
import sys

import pytest

from vera_jax.imports import without

COMMAND = """
from importlib.util import find_spec
from experiments import cli

cli.run(lambda: print(find_spec("torch")), usage="", torch={})
"""


def test_a_library_is_hidden_unless_it_is_imported_already(monkeypatch):
  monkeypatch.delitem(sys.modules, "wave", raising=False)
  with without("wave", "os"):
    with pytest.raises(ImportError):
      import wave
    import os as same
  assert same is os
  import wave

  assert wave.open


@pytest.mark.parametrize("asked", [False, True])
def test_a_command_finds_torch_only_if_it_uses_it(asked, tmp_path):
  (tmp_path / "torch.py").touch()
  path = f"{tmp_path}{os.pathsep}{os.getcwd()}"
  ran = subprocess.run(
    [sys.executable, "-c", COMMAND.format(asked)],
    env={**os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
    check=True,
  )
  assert (ran.stdout == "None\n") != asked
