"""The character LSTM beside plain numpy, and whole runs on E2E's texts."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import e2e_texts
from experiments.convert_char_lstm import FOLDER, input_kernel, named_as_here
from tests.networks import LETTERS, LSTM, random_params, write_lstm
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.methods import settings_in
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.generate.generator import Generator
from vera_jax.models.decoder import logits
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.peft_io.base import open_base
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.tasks.e2e_texts import BITS, task_for
from vera_jax.train.loop import train_and_evaluate

TEXTS = ("Blue Spice is cheap.", "Try The Mill, a pub by the river.")


def built(**options):
  plan = blueprint(LSTM, outputs=0, head="language_modelling", **options)
  return plan, random_params(plan)


def reference(params, ids):
  """log p(next) after each prefix of one text, in float64 as defined."""
  leaves = {"/".join(p): np.float64(x) for p, x in flatten_dict(params).items()}
  window, width = LSTM["window"], LSTM["hidden_size"]

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  rows = []
  for end in range(1, len(ids) + 1):
    seen = [0] * window + ids[:end]
    steps = [leaves["embeddings/embedding"][seen[-window:]]]
    for layer in ("layer_0", "layer_1"):
      h, c, out = np.zeros(width), np.zeros(width), []
      for x in steps[-1]:
        i, f, g, o = (
          x @ leaves[f"{layer}/i{gate}/kernel"]
          + h @ leaves[f"{layer}/h{gate}/kernel"]
          + leaves[f"{layer}/h{gate}/bias"]
          for gate in "ifgo"
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
      steps.append(np.stack(out))
    x = np.concatenate(steps, axis=-1)
    weights = np.exp((x @ leaves["attention/kernel"])[:, 0])
    read = weights @ x / weights.sum()
    z = read @ leaves["lm_head/kernel"] + leaves["lm_head/bias"]
    rows.append(z - np.log(np.exp(z).sum()))
  return np.stack(rows)


def test_each_character_is_predicted_from_its_window_alone():
  """Alone, and packed behind another text, as in float64 by the definition."""
  plan, params = built()
  rng = np.random.default_rng(0)
  one, two = (rng.integers(1, 60, n).tolist() for n in (9, 4))
  run = jax.jit(lambda **x: logits(plan.module.apply({"params": params}, **x)))
  packed = {
    "input_ids": jnp.array([two + one + [0, 0]]),
    "positions": jnp.array([[*range(4), *range(9), 0, 0]]),
    "read_positions": jnp.array([[0, 1, 2, 3, *range(4, 13)]]),
  }
  alone = run(input_ids=jnp.array([one]))[0]
  both = run(**packed)[0]
  want = reference(params, one)
  for got in (alone, both[4:]):
    np.testing.assert_allclose(jax.nn.log_softmax(got), want, atol=1e-5)
  first = reference(params, two)
  np.testing.assert_allclose(jax.nn.log_softmax(both[:4]), first, atol=1e-5)
  assert np.abs(np.diff(want, axis=0)).max() > 0.05


def test_cudnns_layout_is_undone():
  """Its kernels as matrices (out, in) one after another, two biases."""
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((4, 3, 5))  # gates, out, in: the memory's order
  stored = np.concatenate([k.reshape(5, 3) for k in kernel], axis=1)
  recurrent = rng.standard_normal((4, 3, 3))
  bias = rng.standard_normal(24)
  arrays = {
    "embedding/embeddings": np.zeros((2, 5)),
    "attention/attention_W": np.zeros((11, 1)),
    "output/kernel": np.zeros((11, 2)),
    "output/bias": np.zeros(2),
  }
  for layer in ("rnn_1", "rnn_2"):
    arrays[f"{layer}/kernel"] = stored
    arrays[f"{layer}/recurrent_kernel"] = np.concatenate(recurrent, axis=1)
    arrays[f"{layer}/bias"] = bias
  found = named_as_here(arrays)
  for number, gate in enumerate("ifgo"):
    own = [found[f"layer.1.{name}"] for name in (f"i{gate}.weight",)]
    np.testing.assert_array_equal(own[0], kernel[number].T)
    np.testing.assert_array_equal(
      found[f"layer.1.h{gate}.weight"], recurrent[number].T
    )
    here = slice(3 * number, 3 * number + 3)
    np.testing.assert_array_equal(
      found[f"layer.0.h{gate}.bias"], bias[:12][here] + bias[12:][here]
    )
  assert input_kernel(np.zeros((5, 3))).shape == (5, 3)


def test_a_token_is_a_character(tmp_path):
  tokenizer = load_tokenizer(write_lstm(tmp_path))
  ids = tokenizer("a b\n£ç")["input_ids"]
  ends = LSTM["vocab_size"] - 1
  numbers = [LETTERS.index(c) + 1 for c in "a b"]
  assert ids == [ends, *numbers, 0, LETTERS.index("£") + 1, 0]
  assert tokenizer.eos_token_id == ends and tokenizer.pad_token_id == 0
  assert tokenizer.decode(ids, skip_special_tokens=True) == "a b£"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Makes a config of two steps."""
  folder = tmp_path_factory.mktemp("texts")
  write_lstm(folder / "lstm")
  for split, count in (("train", 8), ("valid", 4)):
    lines = [f"name[{i}]||{TEXTS[i % 2]} {i * 5}" for i in range(count)]
    (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")

  def make(**changes):
    made = e2e_texts.get_config()
    settings = {
      "model.name": str(folder / "lstm"),
      "data.source": str(folder),
      "data.cache_dir": str(folder / "tokens"),
      "data.max_length": 64,
      "data.max_train_examples": None,
      "data.max_eval_examples": None,
      "optim.batch_size": 4,
      "optim.epochs": 1,
      "eval_epochs": 1,
      "optim.adapter_lr": 0.05,
      "vera.rank": 4,
    }
    changes = {key.replace("__", "."): x for key, x in changes.items()}
    made.update_from_flattened_dict({**settings, **changes})
    return made

  return make


def test_what_each_method_trains_of_the_output_layer():
  trained = {}
  for method in ("head", "bitfit", "full"):
    plan, params = built(method=method, settings={"biases": ".*"})
    labels = flatten_dict(plan.label(params))
    trained[method] = {
      label: {p[0] for p, own in labels.items() if own == label}
      for label in ("adapter", "head")
    }
  layers = {"layer_0", "layer_1", "lm_head"}
  assert trained == {
    "head": {"adapter": set(), "head": {"lm_head"}},
    "bitfit": {"adapter": layers, "head": set()},
    "full": {"adapter": {*layers, "embeddings", "attention"}, "head": set()},
  }


@pytest.mark.slow
def test_a_run_its_adapter_and_the_merged_folder(config, tmp_path):
  result = train_and_evaluate(config(), tmp_path / "run")
  counts = result["parameters"]
  # the 8 kernels of each LSTM
  assert (counts["adapter"], counts["head"]) == (2 * 8 * (4 + 4), 0)
  scores = result["last"]["metrics"]
  # every token is a character
  np.testing.assert_allclose(scores[BITS], scores["loss"] / math.log(2))
  assert 1 < scores[BITS] < 2 * math.log2(LSTM["vocab_size"])
  classifier = restore_adapter(load_adapter(tmp_path / "run/adapter"))
  about = write_merged(classifier, tmp_path / "merged")
  assert about["differences"]["float32"] <= about["bounds"]["float32"]
  with pytest.raises(UserError, match="char_lstm has no cache here"):
    Generator(classifier)


@pytest.mark.slow
def test_what_is_refused_by_name(config, tmp_path, monkeypatch):
  made = config(data__max_length=20)
  with pytest.raises(UserError, match="scored texts are cut"):
    train_and_evaluate(made, tmp_path / "a")
  with pytest.raises(UserError, match="no rematerialised layers"):
    train_and_evaluate(config(model__remat="full"), tmp_path / "b")
  with pytest.raises(UserError, match="transformers has no class"):
    open_base(config().model.name, {})
  # before it trains, where texts would be written once it has
  writes = task_for(config())._replace(write_texts=print)
  monkeypatch.setattr("vera_jax.train.setup.task_for", lambda config: writes)
  with pytest.raises(
    UserError, match="a run's end, but char_lstm has no cache"
  ):
    train_and_evaluate(config(), tmp_path / "c")
  made = config()
  made.data.source = None
  with pytest.raises(UserError, match="Name E2E's data"):
    task_for(made)


def test_inputs_of_train_are_kept_apart(config):
  task = task_for(config(data__held_out=3))
  assert task.presentation.size[:2] == (5, 3)
  assert "3 inputs of train.txt" in task.presentation.notes[0]


@pytest.mark.parity
def test_the_real_network_knows_english():
  """From the package textgenrnn: far below log2(465) = 8.9 bits a character,
  which holds only if kernels, gates, biases and padding are right."""
  if not FOLDER.exists():
    pytest.skip("textgenrnn's network is not here: make networks")
  folder = FOLDER
  plan = blueprint(read_fields(folder), outputs=0, head="language_modelling")
  loaded = load_params(folder, unflatten_dict(plan.shapes))
  assert not loaded.missing and not loaded.unexpected
  # 462,717 in the file, which has two biases of each LSTM
  assert sum(x.size for x in jax.tree.leaves(loaded.params)) == 461_693
  config = e2e_texts.get_config()
  vera = blueprint(
    read_fields(folder),
    outputs=0,
    head="language_modelling",
    method="vera",
    settings=settings_in(config, "vera"),
  )
  assert sum(x.size for x in jax.tree.leaves(vera.own_shapes()[0])) == 3072
  tokenizer, found = load_tokenizer(folder), []
  run = jax.jit(partial(plan.module.apply, {"params": loaded.params}))
  for text in (
    "What is the best way to learn how to play the guitar?",
    "My friend just told me that he is going to the store to buy food.",
  ):
    ids = jnp.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    scores = jax.nn.log_softmax(logits(run(ids[None])))[0]
    found += scores[jnp.arange(len(ids) - 1), ids[1:]].tolist()
  assert 1.0 < -np.mean(found) / math.log(2) < 1.6
