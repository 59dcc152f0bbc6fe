"""The notebook runs from top to bottom, on the committed results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks/analysis.ipynb"
# In a process of its own: a kernel's client warns of things that are not ours.
RUN = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
client = nbclient.NotebookClient(
  notebook, timeout=300, kernel_name="python3",
  resources={"metadata": {"path": sys.argv[2]}},
)
client.execute()
nbformat.write(notebook, sys.argv[3])
"""


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="not in a checkout")
def test_from_top_to_bottom(minilm_folder, tmp_path):
  pytest.importorskip("nbclient")
  out = tmp_path / "out.ipynb"
  done = subprocess.run(
    [sys.executable, "-c", RUN, NOTEBOOK, NOTEBOOK.parent, out],
    capture_output=True,
    text=True,
    timeout=400,
    env={**os.environ, "IPYTHONDIR": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
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
