"""Libraries that stay out of a command, though they are installed."""

import os
import subprocess
import sys

import pytest

from vera_jax.imports import without

COMMAND = """
import sys
from experiments import cli
from vera_jax.data.tokenizer import load_tokenizer

def main():
  load_tokenizer({folder!r})
  print("torch" in sys.modules)
  import torch, scipy.stats

cli.run(main, usage="", torch={torch})
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


@pytest.mark.parametrize("used", [False, True])
def test_a_command_imports_torch_only_if_it_uses_it(used, minilm_folder):
  pytest.importorskip("torch")
  ran = subprocess.run(
    [
      sys.executable,
      "-c",
      COMMAND.format(folder=str(minilm_folder), torch=used),
    ],
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    capture_output=True,
    text=True,
  )
  assert ran.stdout == f"{used}\n", ran.stderr
  assert ran.returncode == 0
