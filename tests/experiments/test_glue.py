"""The command itself, as users type it."""

import json
from functools import partial

import pytest

from tests.experiments import command
from vera_jax.errors import UserError
from vera_jax.train.loop import train_and_evaluate

RTE = "--config=configs/rte.py"
glue = partial(command.run, "glue")


@pytest.fixture
def flags(tiny_settings, tmp_path):
  settings = {**tiny_settings, "optim.epochs": 1}
  return [
    RTE,
    f"--workdir={tmp_path / 'run'}",
    *(f"--config.{key}={value}" for key, value in settings.items()),
  ]


def test_a_target_that_matches_nothing_lists_the_layers(tiny_config, tmp_path):
  config = tiny_config(vera__targets=("query", "kye"))
  with pytest.raises(UserError) as caught:
    train_and_evaluate(config, tmp_path / "run")
  assert "'kye'" in str(caught.value)
  assert "encoder/layer_0/attention/self/key" in str(caught.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.smoke
def test_targets_from_the_command_line(flags, tmp_path):
  targets = "--config.vera.targets=('query', 'key', 'output/dense')"
  done = glue(*flags, targets, "--json")
  assert done.returncode == 0, done.stderr
  # two layers of width 16, of four matched layers each, rank 8
  assert f"adapter {2 * 4 * (16 + 8)}" in done.stderr
  assert "epoch 1 of 1: accuracy" in done.stderr
  assert "best epoch" in done.stderr  # standard output has the result alone
  written = json.loads((tmp_path / "run/result.json").read_text())
  assert json.loads(done.stdout) == written


@pytest.mark.slow
def test_seeds_train_at_once(flags, tmp_path):
  words = ["experiments.glue", *flags]
  other = [*words, "--config.optim.head_lr=1e38"]
  done, held, nan = command.run_each(
    [*words, "--seeds=0,1"], [*other, "--seeds=0,5"], [*other, "--seeds=5"]
  )
  assert done.returncode == 0, done.stderr
  assert "2 runs at once" in done.stderr
  for seed in (0, 1):
    assert f"seed {seed}: epoch 1 of 1: accuracy" in done.stderr
    assert (tmp_path / "run" / f"seed{seed}" / "result.json").exists()
  assert "median" in done.stdout
  assert held.returncode == nan.returncode == 1
  assert "seed0 holds a run of another config" in held.stderr
  assert "seed 5: The" in nan.stderr and "at step" in nan.stderr
