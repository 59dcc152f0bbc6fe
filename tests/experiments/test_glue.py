"""The command itself: what users type, and what they mistype."""

from functools import partial

import pytest

from tests.experiments import command
from vera_jax.errors import UserError
from vera_jax.train.loop import train_and_evaluate

RTE = "--config=configs/rte.py"
glue = partial(command.run, "glue")
refused = partial(command.refused, "glue")


LACKING = ["--config=configs/common.py", "--config.task=rte"]
LACKING += ["--config.vera.lr=1"]
MISTAKES = [
  (1, [], "--config=configs/rte.py"),
  (2, [RTE, "--config.vera.rnak=3"], "d_init, head_lr, init, lr"),
  (2, [RTE, "--config.vera.rank=many"], "--config.vera.rank=many"),
  (2, [RTE, "--work=here"], "Unknown command line flag 'work'"),
  (2, [RTE, "leftover"], "leftover"),
  (2, ["--config=configs/nope.py"], "no file configs/nope.py"),
  (2, ["--config=configs/rte.py:huge"], "only base, large"),
  (1, ["--config=configs/common.py"], "config.task, config.optim.epochs"),
  (1, [RTE, "--config.optim.batch_size=0"], "config.optim.batch_size is 0"),
  (1, [RTE, "--seeds=0,one"], "--seeds=0,one: give whole numbers"),
  (1, [RTE, "--seeds=3,4,3"], "Two runs of the ensemble are the same"),
]


@pytest.fixture(scope="module")
def answers():
  """What the command answers to --help, to too few settings, to mistakes."""
  asked = [["--help"], LACKING, *(flags for _, flags, _ in MISTAKES)]
  return command.run_each(*(["experiments.glue", *flags] for flags in asked))


def test_help_is_ours(answers):
  done = answers[0]
  assert done.returncode == 0
  assert done.stdout.startswith("Fine-tune on a GLUE task")
  for word in (
    "--config",
    "--workdir",
    "--seeds",
    "--helpfull",
    "config.model.name",
  ):
    assert word in done.stdout
  for word in ("--verbosity", "--pdb", "--log_dir"):
    assert word not in done.stdout
  assert not done.stderr


def test_a_mistake_is_explained_in_a_line_or_two(answers):
  for (code, _, words), done in zip(MISTAKES, answers[2:], strict=True):
    assert done.returncode == code, done
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_a_required_setting_can_come_from_the_command_line(answers):
  done = answers[1]
  assert done.returncode == 1
  assert "config.optim.epochs, config.vera.head_lr" in done.stderr
  assert "config.task" not in done.stderr


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
def test_targets_from_the_command_line(flags):
  targets = "--config.vera.targets=('query', 'key', 'output/dense')"
  done = glue(*flags, targets)
  assert done.returncode == 0, done.stderr
  # two layers of width 16, of four matched layers each, rank 8
  assert f"adapter {2 * 4 * (16 + 8)}" in done.stderr
  assert "epoch 1 of 1: accuracy" in done.stderr
  assert "best epoch" in done.stdout
  assert refused(1, *flags).count("there,") == 1  # another config: targets


@pytest.mark.slow
def test_seeds_train_at_once(flags, tmp_path):
  done = glue(*flags, "--seeds=0,1")
  assert done.returncode == 0, done.stderr
  assert "2 runs at once" in done.stderr
  for seed in (0, 1):
    assert f"seed {seed}: epoch 1 of 1: accuracy" in done.stderr
    assert (tmp_path / "run" / f"seed{seed}" / "result.json").exists()
  assert "median" in done.stdout
  other = [*flags, "--config.optim.head_lr=1e38"]
  held, nan = command.refused_each(
    "glue", 1, [*other, "--seeds=0,5"], [*other, "--seeds=5"]
  )
  assert "seed0 holds a run of another config" in held
  assert "seed 5: The" in nan and "at step" in nan
