"""The command itself: what a researcher types, and mistypes."""

from tests.experiments.command import refused_each, run

RANK = "--config=configs/sweeps/rank.py:minilm"


def test_a_mistake_is_explained_in_a_line_or_two():
  mistakes = [
    (["--config=configs/rte.py", "--workdir=x"], "experiments.glue"),
    ([RANK], "--workdir=DIR"),
    ([RANK, "--workdir=x", "--shard=4/4"], "from 0 to n - 1"),
  ]
  said = refused_each("sweep", 1, *(flags for flags, _ in mistakes))
  for (_, words), message in zip(mistakes, said, strict=True):
    assert words in message and len(message.splitlines()) <= 3


def test_a_dry_run_counts_and_leaves_nothing(tmp_path):
  folder = tmp_path / "sweep"
  done = run(
    "sweep",
    RANK,
    f"--workdir={folder}",
    "--dry_run",
    "--shard=1/2",
    "--config.base.seed=3",
    "--tflops=2",
    COLUMNS="120",
  )
  assert done.returncode == 0, done.stderr
  # ten ranks in two shards; one seed is left of three
  assert "of 10 runs in" in done.stdout and "shard 1/2: " in done.stdout
  assert "vera-rank" in done.stdout and "new" in done.stdout
  assert "at 2 TFLOP/s, as given" in done.stdout
  assert not folder.exists()
