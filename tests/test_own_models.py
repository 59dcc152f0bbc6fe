"""The page on models of one's own: its scripts run, each in its own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/own_models.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")


def run(script, folder):
  done = subprocess.run(
    [sys.executable, script],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
def test_the_page(tmp_path):
  page = PAGE.read_text(encoding="utf-8")
  scripts = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.S))
  assert list(scripts) == ["own.py", "train.py", "later.py"]
  for name, text in scripts.items():
    (tmp_path / name).write_text(text, encoding="utf-8")
  printed = run("train.py", tmp_path)
  assert f"```\n{printed}```\n" in page
  run("later.py", tmp_path)
