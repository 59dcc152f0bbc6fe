"""The next word's loss and scores: packed as padded, smoothed, cut, read."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from tests.tasks.decoder_files import GPT2, LLAMA, WORDS, write_decoder
from vera_jax.data.completions import Completions
from vera_jax.data.examples import Examples
from vera_jax.data.loader import eval_batches
from vera_jax.data.packing import Layout, pack_runs
from vera_jax.models.decoder import Words, logits
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.tasks.language_modelling import (
  language_modelling,
  loss,
  measure,
)

ONE_LAYER = {**LLAMA, "num_hidden_layers": 1}
RNG = np.random.default_rng(0)
FIRST = [" ".join(RNG.choice(WORDS, n)) for n in (3, 1, 4, 2, 6, 2)]
SECOND = [" ".join(RNG.choice(WORDS, n)) for n in (2, 5, 1, 3, 1, 2)]
PAIRS = Examples(FIRST, SECOND, None, np.arange(6))
TEXTS = Examples(SECOND, None, None, np.arange(6))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  """(its folder, its parameters, these and a batch -> Words)."""
  folder = write_decoder(tmp_path_factory.mktemp("llama"), ONE_LAYER)
  return folder, *loaded(folder)


def on_device(batch):
  return {name: jnp.asarray(array) for name, array in batch.items()}


def loaded(folder):
  plan = blueprint(
    read_fields(folder), head="language_modelling", outputs=0, scan=False
  )
  params = load_params(folder, unflatten_dict(plan.shapes)).params
  names = tuple(plan.inputs)

  @jax.jit
  def apply(params, batch):
    inputs = {name: batch[name] for name in names}
    return plan.module.model.apply({"params": params}, **inputs)

  return jax.tree.map(jnp.asarray, params), apply


@pytest.fixture(scope="module")
def data(decoder, tmp_path_factory):
  """Prompts with completions to train on, texts and completions to score."""
  splits = {"train": PAIRS, "dev": PAIRS, "dev_texts": TEXTS}
  task = language_modelling(
    "tiny",
    read_split=lambda source, split: splits[split],
    dev_splits=("dev", "dev_texts"),
    completions=Completions("right"),
  )
  config = ConfigDict(
    {
      "data": {
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
        "source": None,
        "max_length": 7,
        "max_train_examples": None,
        "subset_seed": 0,
      },
      "optim": {"batch_size": 6, "epochs": 1, "microbatch_rows": None},
      "eval_batch_size": 3,
    }
  )
  return task, task.load(config, decoder[0])


def test_packed_is_padded(decoder, data):
  """Loss, gradient and scores, however the examples lie."""
  _, params, apply = decoder
  tokens = data[1].tokens["train"]
  assert tokens.truncated == 1 and tokens.reads.sum() == 19

  @jax.jit
  def found(params, batch):
    def summed(params):
      words = apply(params, batch)
      total, count = loss(words, batch, smoothing=0.1)
      return total, (count, measure(words, batch))

    (total, (count, scores)), slopes = jax.value_and_grad(summed, has_aux=True)(
      params
    )
    means = jax.tree.map(lambda leaf: leaf / count, (total, slopes))
    return count, scores.sum(0), means

  results = []
  for slots, rows in ((4, 3), (1, 6)):
    layout = Layout((6,), 16, slots, reads=10)
    (batch,) = pack_runs(tokens, [np.arange(6)], layout)[0]
    assert (batch["segment_ids"].max(1) > 0).sum() == rows
    batch.pop("example")  # else of one shape for both
    results.append(found(params, on_device(batch)))
  for packed, padded in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(packed, padded, rtol=1e-5, atol=1e-6)
  assert results[0][0] == 19


def test_loss_and_scores_are_those_of_all_logits(decoder, data):
  _, params, apply = decoder
  task, packed = data
  seen = []

  @jax.jit
  def outcome(params, batch):
    words = apply(params, batch)
    return logits(words), task.loss(words, batch), task.measure(words, batch)

  def measured(batch):
    z, (total, count), sums = outcome(params, on_device(batch))
    z = np.asarray(z, np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    own = np.take_along_axis(p, batch["labels"][..., None], -1)[..., 0]
    real = batch["weights"] > 0
    np.testing.assert_allclose(total, -np.log(own[real]).sum(), rtol=1e-5)
    assert count == real.sum()
    hits = p.argmax(-1)[real] == batch["labels"][real]
    seen.extend(zip(-np.log(own[real]), hits, strict=True))
    return sums

  scores = task.evaluate(measured, packed).scores
  assert next(iter(scores)) == task.score_name
  sizes = [int(packed.tokens[split].reads.sum()) for split in packed.tokens]
  assert sizes == [19, 19, 14]
  nll, hits = np.array(seen[:19], float).T
  assert scores["loss"] == pytest.approx(nll.mean(), rel=1e-5)
  assert scores["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
  assert scores["token_probability"] == pytest.approx(1 / scores["perplexity"])
  assert scores["token_accuracy"] == pytest.approx(hits.mean())
  nll, _ = np.array(seen[19:], float).T
  assert scores["loss/dev_texts"] == pytest.approx(nll.mean(), rel=1e-5)


def test_an_empty_read_counts_nothing_and_nan_ends_the_run(data):
  task, packed = data
  batches = eval_batches(packed.tokens["dev"], packed.eval_layouts["dev"])
  batch = on_device(next(batches))
  shape = (*batch["labels"].shape, 2)
  hidden = np.where(batch["weights"][..., None] > 0, np.ones(shape), np.nan)
  kernel = jnp.ones((2, 24))
  total, count = loss(Words(jnp.float32(hidden), kernel), batch)
  assert float(total / count) == pytest.approx(np.log(24), rel=1e-6)
  broken = jnp.full(shape, jnp.nan)
  outcome = task.evaluate(
    lambda batch: measure(Words(broken, kernel), on_device(batch)),
    packed,
  )
  assert not outcome.finite


def test_stories260k_knows_its_own_words(tmp_path):
  """Real weights and a real tokenizer, against numbers made in float64."""
  shared = Path(__file__).resolve().parents[3] / "shared/data/checkpoints"
  folder = shared / "stories260K"
  if not folder.is_dir():
    pytest.skip("stories260K is not beside the checkout")
  known = json.loads((folder / "expected_greedy.json").read_text())
  text = Examples([known["text"]], None, None, np.arange(1))
  task = language_modelling(
    "stories",
    read_split=lambda source, split: text,
    dev_splits=("dev",),
    completions=Completions("right"),
  )
  config = ConfigDict(
    {
      "data": {
        "cache_dir": str(tmp_path),
        "source": None,
        "max_length": 200,  # all but the end of text, which it does not give
        "max_train_examples": None,
        "subset_seed": 0,
      },
      "optim": {"batch_size": 1, "epochs": 1, "microbatch_rows": None},
      "eval_batch_size": 1,
    }
  )
  data = task.load(config, folder)
  assert data.tokens["dev"].ids.tolist() == known["ids"]
  params, apply = loaded(folder)
  scores = task.evaluate(
    lambda batch: measure(apply(params, batch := on_device(batch)), batch),
    data,
  ).scores
  want = known["mean_nll_of_own_greedy_text"]
  assert scores["loss"] == pytest.approx(want, abs=1e-5)
  assert scores["token_accuracy"] == 1  # it is the greedy text


@pytest.mark.parity
def test_torch_gives_the_same_loss(tmp_path):
  """Of transformers' model by its labels, and smoothed as microsoft/LoRA's
  example does it."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = write_decoder(tmp_path, GPT2)
  params, apply = loaded(folder)
  ids = np.random.default_rng(1).integers(0, 24, (2, 9)).astype(np.int32)
  batch = {
    "input_ids": ids,
    "positions": np.tile(np.arange(9, dtype=np.int32), (2, 1)),
    "segment_ids": np.ones_like(ids),
    "read_positions": np.tile(np.arange(3, 8, dtype=np.int32), (2, 1)),
    "labels": ids[:, 4:],
    "weights": np.ones((2, 5), np.float32),
  }
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  labels = torch.tensor(ids).long()
  labels[:, :4] = -100
  with torch.no_grad():
    found = model(torch.tensor(ids).long(), labels=labels)
    scores = torch.log_softmax(found.logits[:, 3:8], -1)
    own = scores.gather(-1, labels[:, 4:, None])[..., 0]
    smoothed = (-0.9 * own - 0.1 * scores.mean(-1)).mean()
  ours = on_device(batch)
  words = apply(params, ours)
  for smoothing, want in ((0.0, found.loss), (0.1, smoothed)):
    total, count = loss(words, ours, smoothing=smoothing)
    assert float(total / count) == pytest.approx(float(want), abs=1e-5)
