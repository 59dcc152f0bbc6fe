"""The command itself: what a researcher types, and mistypes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = "--config=configs/sweeps/rank.py:minilm"


def sweep(*flags):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.sweep", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "COLUMNS": "120"},
    timeout=120,
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


def test_help_has_what_a_cluster_needs():
  done = sweep("--help")
  assert done.returncode == 0 and done.stdout.startswith("Train a sweep")
  for word in ("SLURM_ARRAY_TASK_ID", "--requeue", "--retry_failed", "exit"):
    assert word in done.stdout


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config=configs/rte.py", "--workdir=x"], "experiments.glue"),
    ([RANK], "--workdir=DIR"),
    ([RANK, "--workdir=x", "--shard=4/4"], "from 0 to n - 1"),
  ],
)
def test_a_mistake_is_explained_in_a_line_or_two(flags, words):
  done = sweep(*flags)
  assert done.returncode == 1 and words in done.stderr
  assert len(done.stderr.splitlines()) <= 3


def test_a_dry_run_counts_and_leaves_nothing(tmp_path):
  folder = tmp_path / "sweep"
  done = sweep(
    RANK,
    f"--workdir={folder}",
    "--dry_run",
    "--shard=1/2",
    "--config.base.seed=3",
    "--tflops=2",
  )
  assert done.returncode == 0, done.stderr
  # ten ranks in two shards; one seed is left of three
  assert "of 10 runs in" in done.stdout and "shard 1/2: " in done.stdout
  assert "vera-rank" in done.stdout and "new" in done.stdout
  assert "at 2 TFLOP/s, as given" in done.stdout
  assert not folder.exists()
