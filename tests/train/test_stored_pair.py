"""A pair that was trained is frozen for another run, and lies in its file."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adapters.conftest import Net
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.projections import digest
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted

RANK = 6


def test_a_run_on_a_trained_pair(tiny_config, random_adapter, tmp_path):
  """The run's own file has the pair, and needs the other one no more."""
  tied = random_adapter("tied_lora", rank=RANK)
  pair = {k: load_adapter(tied).tensors[f"tied_lora_{k}"] for k in "AB"}
  config = tiny_config()
  settings = {"rank": RANK, "init": "stored", "pair": str(tied)}
  config.vera.update(settings)
  config.optim.epochs = 1
  result = train_and_evaluate(config, tmp_path / "run")
  assert result["projection_digest"] == digest(pair)

  shutil.rmtree(tied)
  saved = load_adapter(tmp_path / "run/adapter")
  assert "pair" not in saved.about["settings"]
  for name, matrix in restore_adapter(saved).projections.items():
    np.testing.assert_array_equal(matrix, pair[name])
  # and so it may be the pair of a third
  config.vera.pair = str(tmp_path / "run/adapter")
  again = train_and_evaluate(config, tmp_path / "again")
  assert again["projection_digest"] == result["projection_digest"]
  assert again["best"]["metrics"] == result["best"]["metrics"]


def test_another_pair_does_not_go_on(
  tiny_config, random_adapter, tmp_path, stop_at
):
  tied = random_adapter("tied_lora", rank=RANK)
  config = tiny_config()
  config.vera.update({"rank": RANK, "init": "stored", "pair": str(tied)})
  stop_at(3)
  with pytest.raises(Interrupted):
    train_and_evaluate(config, tmp_path / "run")
  shutil.rmtree(tied)
  other = random_adapter("tied_lora", rank=RANK, spread=0.3)
  shutil.move(other, tied)
  with pytest.raises(UserError, match="the pair A, B"):
    train_and_evaluate(config, tmp_path / "run")


def on_net(**settings):
  x = jnp.ones((1, 3))
  model = adapt(Net("looped"), vera(**settings), targets=["fused"])
  return jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.parametrize(
  "settings, text",
  [
    ({"init": "stored"}, "name its folder, as pair"),
    ({"pair": "TIED"}, "init is 'kaiming_uniform': set init=stored"),
    ({"init": "stored", "pair": "TIED", "sharing": "unique"}, "one for all"),
    ({"init": "stored", "pair": "SEEDED"}, "by projection_seed=0"),
    ({"init": "stored", "pair": "TIED", "rank": 5}, "set rank to 6"),
    ({"init": "stored", "pair": "TIED"}, "is for layers of up to 16 inputs"),
  ],
)
def test_what_has_no_meaning(random_adapter, settings, text):
  folders = {
    "TIED": random_adapter("tied_lora", rank=RANK),
    "SEEDED": random_adapter(),
  }
  pair = settings.get("pair", "")
  settings = {"rank": RANK, **settings, "pair": str(folders.get(pair, ""))}
  with pytest.raises(UserError, match=text):
    on_net(**settings)
