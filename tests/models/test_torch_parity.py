"""Live comparison with transformers' torch models; skips without torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.models.bert import BertClassifier
from vera_jax.models.family import load_config
from vera_jax.models.hf_weights import load_params, to_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = {
  "vocab_size": 100,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 64,
  "max_position_embeddings": 40,
  "initializer_range": 0.2,
}
SENTENCES = [
  ("A gripping, funny film.", "The film was funny."),
  (
    "The cat sat on the mat while it rained all day long outside.",
    "It rained.",
  ),
  ("Prices fell by 3.5% in May, analysts said; nobody knows why.", "Why?"),
  ("No.", "Yes, absolutely, without any doubt whatsoever."),
]


def torch_logits(model, batch):
  with torch.no_grad():
    tensors = {k: torch.from_numpy(v).long() for k, v in batch.items()}
    return model.eval()(**tensors).logits.numpy()


@partial(jax.jit, static_argnums=0)
def our_logits(model, params, batch):
  arrays = {k: v for k, v in batch.items() if k != "attention_mask"}
  return model.apply({"params": params}, **arrays)[:, 0]


def random_batch(config):
  """Rows of 11, 4 and 1 tokens in 11 columns; BERT's have two types."""
  rng = np.random.default_rng(3)
  mask = (np.arange(11) < np.array([[11], [4], [1]])).astype(np.int64)
  ids = np.where(mask, rng.integers(5, 100, (3, 11)), config.pad_token_id)
  types = rng.integers(0, config.type_vocab_size, (3, 11))
  return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_every_token_has_outputs_for_tagging(family, tmp_path, shapes):
  torch.manual_seed(0)
  pad = 1 if family == "Roberta" else 0
  config = getattr(transformers, f"{family}Config")(
    **SIZES, num_labels=3, pad_token_id=pad
  )
  peer = getattr(transformers, f"{family}ForTokenClassification")(config)
  peer.save_pretrained(tmp_path)
  model = BertClassifier(load_config(tmp_path), 3, head="token_classification")
  loaded = load_params(tmp_path, shapes(model))
  assert loaded[1:] == ((), (), ())
  batch = random_batch(config)
  arrays = {k: v for k, v in batch.items() if k != "attention_mask"}
  got = jax.jit(model.apply)({"params": loaded.params}, **arrays)
  real = batch["attention_mask"] > 0
  want = torch_logits(peer, batch)
  np.testing.assert_allclose(got[real], want[real], atol=1e-4)
  assert np.ptp(want[real], axis=0).min() > 0.01


@pytest.mark.parametrize("scan", [True, False])
def test_minilm_on_padded_pairs(scan, minilm_folder, shapes):
  torch.manual_seed(0)
  peer = transformers.AutoModelForSequenceClassification.from_pretrained(
    minilm_folder, num_labels=3
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
  batch = dict(
    tokenizer(*map(list, zip(*SENTENCES, strict=True)), padding=True)
  )
  batch = {k: np.array(v) for k, v in batch.items()}
  assert (batch["attention_mask"] == 0).any()
  assert batch["token_type_ids"].any()
  model = BertClassifier(load_config(minilm_folder), 3, scan=scan)
  loaded = load_params(minilm_folder, shapes(model))
  assert loaded.missing == ("classifier/bias", "classifier/kernel")
  assert (loaded.unexpected, loaded.dropped) == (
    (),
    ("embeddings.position_ids",),
  )
  head = {
    "kernel": peer.classifier.weight.detach().numpy().T,
    "bias": peer.classifier.bias.detach().numpy(),
  }
  params = {**loaded.params, "classifier": head}
  got = our_logits(model, params, batch)
  np.testing.assert_allclose(got, torch_logits(peer, batch), atol=1e-4)

  tensors = to_hf(params, model.config)
  state = peer.state_dict()
  assert tensors.keys() == state.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)


def test_gradients_follow_torch(tmp_path, shapes):
  torch.manual_seed(0)
  config = transformers.BertConfig(
    **SIZES,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  peer = transformers.BertForSequenceClassification(config)
  peer.save_pretrained(tmp_path)
  model = BertClassifier(load_config(tmp_path), 3)
  params = load_params(tmp_path, shapes(model)).params
  batch = random_batch(config)
  tensors = {k: torch.from_numpy(v).long() for k, v in batch.items()}
  peer(**tensors).logits.square().sum().backward()
  grads = jax.grad(
    lambda params: jnp.sum(jnp.square(our_logits(model, params, batch)))
  )(params)
  want = {k: v.grad.numpy() for k, v in peer.named_parameters()}
  for name, grad in to_hf(grads, model.config).items():
    scale = np.abs(want[name]).max() + 1e-3
    np.testing.assert_allclose(
      grad / scale, want[name] / scale, atol=1e-3, err_msg=name
    )
