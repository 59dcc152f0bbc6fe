"""The round trips as CI runs them, and what makes them fail."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tours import run as tour
from tests.tours.decoders import decoder_trips
from tests.tours.page import Step, Texts
from vera_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def rows(page):
  """Cells of each table row, without the measured numbers."""
  lines = [line for line in page.splitlines() if line.startswith("| ")]
  cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  return [(row[0], row[1], row[3]) if len(row) > 4 else row[0] for row in cells]


@pytest.mark.parity
def test_all_round_trips(minilm_folder, tmp_path):
  """Every arrow within its bound; the page in docs/ has the same rows."""
  pytest.importorskip("torch")
  pytest.importorskip("peft")
  pytest.importorskip("llama_cpp_py_sync")
  done = subprocess.run(
    [sys.executable, "-m", "tests.tours.run", f"--out={tmp_path}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "XLA_FLAGS": ""},  # one device, as users have
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr
  committed = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
  found = (tmp_path / "tour.md").read_text(encoding="utf-8")
  assert len(rows(found)) > 40
  assert rows(found) == rows(committed)
  facts = json.loads((tmp_path / "tour.json").read_text())
  tables = [facts["steps"], *facts["decoders"].values(), facts["sizes"]]
  assert sum(len(table) + 2 for table in tables) == len(rows(found))
  for size in facts["sizes"]:
    assert size["ours"] < size["theirs"]
    assert size["ours"] <= 4 * size["numbers"] + 16 * 1024


@pytest.mark.skipif(
  find_spec("torch") is not None,
  reason="test_all_round_trips takes these steps and more",
)
@pytest.mark.slow
def test_a_decoders_round_trips_without_torch(tmp_path):
  steps = list(decoder_trips(tmp_path, "gpt2", with_torch=False))
  assert len(steps) == 10
  tour.check(steps)


STEP = Step("a → b", "logits: a, b", 1e-6, 1e-4)


@pytest.mark.parametrize(
  "changes, passed",
  [
    ({}, True),
    ({"difference": 1e-3}, False),
    ({"difference": float("nan")}, False),
    ({"difference": 1e-9, "bound": 0.0}, False),
    ({"difference": 0.0, "bound": 0.0}, True),
    ({"moved": True}, False),
    ({"moved": True, "difference": 0.1}, True),
    ({"moved": True, "difference": float("nan")}, False),
    ({"texts": Texts(5, 6, 6)}, False),
    ({"texts": Texts(6, 6, 6)}, True),
    ({"texts": Texts(1, 6, 0)}, True),
    ({"moved": True, "difference": 0.1, "texts": Texts(6, 6, 6)}, False),
  ],
)
def test_a_difference_past_its_bound_fails(changes, passed):
  step = STEP._replace(**changes)
  assert step.passed == passed
  if passed:
    tour.check([STEP, step])
  else:
    with pytest.raises(UserError, match=r"a → b \(logits: a, b\): .* at (m|l)"):
      tour.check([STEP, step])
