"""A sweep as a researcher types it."""

import pytest


# ml_collections loads config files by it
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_dry_run_counts_and_leaves_nothing(
  tmp_path, typed, capsys, monkeypatch
):
  monkeypatch.setenv("COLUMNS", "120")
  folder = tmp_path / "sweep"
  typed(
    "sweep",
    "--config=configs/sweeps/rank.py:minilm",
    f"--workdir={folder}",
    "--dry_run",
    "--shard=1/2",
    "--config.base.seed=3",
    "--tflops=2",
  )
  shown = capsys.readouterr().out
  # ten ranks in two shards; one seed is left of three
  assert "of 10 runs in" in shown and "shard 1/2: " in shown
  assert "vera-rank" in shown and "new" in shown
  assert "at 2 TFLOP/s, as given" in shown
  assert not folder.exists()
