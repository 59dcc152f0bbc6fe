"""A user's texts from training to the adapter, on a tiny decoder."""

import json

import jax
import jax.numpy as jnp
import pytest

from configs import language
from tests.tasks.decoder_files import GPT2, write_decoder
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor
from vera_jax.train.loop import train_and_evaluate

ROWS = [
  {"prompt": f"word{i} word{i + 1}", "completion": f"word{i + 2} word1"}
  for i in range(16)
]
BRIEF = {
  "optim.epochs": 2,
  "optim.batch_size": 8,
  "optim.adapter_lr": 0.05,
  "optim.label_smoothing": 0.1,
  "vera.rank": 4,
  "data.max_length": 5,
  "log.every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The decoder, the texts and the cache."""
  folder = tmp_path_factory.mktemp("language")
  (folder / "model").mkdir()
  write_decoder(folder / "model", {**GPT2, "n_layer": 1})
  texts = "".join(json.dumps(row) + "\n" for row in ROWS)
  (folder / "texts.jsonl").write_text(texts)
  return folder


@pytest.fixture(scope="module")
def config(folder):
  config = language.get_config()
  config.update_from_flattened_dict(BRIEF)
  config.model.name = str(folder / "model")
  config.data.train = str(folder / "texts.jsonl")
  config.data.cache_dir = str(folder / "cache")
  return config


@pytest.fixture(scope="module")
def trained(config, folder):
  return train_and_evaluate(config, folder / "run")


def test_a_run_learns_and_is_shown_again(trained, config, folder):
  assert train_and_evaluate(config, folder / "run") == trained
  first, last = trained["history"]
  assert last["metrics"]["loss"] < first["metrics"]["loss"]
  best = trained["best"]["metrics"]
  assert trained["score_name"] == next(iter(best)) == "token_probability"
  assert best["token_probability"] * best["perplexity"] == pytest.approx(1)
  assert trained["parameters"]["head"] == 0
  assert trained["data"]["train"]["learned"] == 42


def test_the_adapter_goes_back_on_its_base(trained, folder):
  saved = load_adapter(folder / "run/adapter")
  assert saved.about["kind"] == "language_modelling"
  assert saved.about["labels"] == []
  assert saved.about["completions"] == {"cut": "right", "separate": False}
  model = restore_adapter(saved)
  ids = jax.ShapeDtypeStruct((1, 6), jnp.int32)
  words = jax.eval_shape(model.module.apply, model.variables, ids)
  assert words.hidden.shape == (1, 6, 8) and words.kernel.shape == (8, 24)
  with pytest.raises(UserError, match="writes texts; a Predictor answers"):
    Predictor(model)
  bank = AdapterBank({"one": folder / "run/adapter"})
  with pytest.raises(UserError, match="write texts, and answer no questions"):
    bank.logits(["w1"], adapters="one")


def test_a_method_that_would_train_nothing_is_refused(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.method = "head"
  with pytest.raises(UserError, match="config.method=head trains nothing here"):
    train_and_evaluate(config, tmp_path / "run")
