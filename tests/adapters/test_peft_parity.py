"""Live comparison with Hugging Face's PEFT; skips without torch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.lora import lora
from vera_jax.adapters.projections import make_pair
from vera_jax.adapters.vera import vera
from vera_jax.models.bert import BertClassifier
from vera_jax.models.hf_weights import load_config, load_params, module_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

KEY, RANK = 3, 8
SIZES = {
  "vocab_size": 100,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 40,
  "initializer_range": 0.2,
}
VECTORS = {"vera_d": "vera_lambda_d", "vera_b": "vera_lambda_b"}
# Ours and theirs: two layers of one shape, and every layer of the encoder.
TARGETS = [
  (["query", "value"], ["query", "value"]),
  (["query", "key", "value", ".*dense"], ["query", "key", "value", "dense"]),
]


@pytest.fixture
def base(tmp_path):
  """A random torch BERT, and ours with its weights."""
  torch.manual_seed(0)
  peer = transformers.BertForSequenceClassification(
    transformers.BertConfig(**SIZES, num_labels=3)
  )
  peer.save_pretrained(tmp_path)
  model = BertClassifier(load_config(tmp_path), 3)
  ids = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  return peer.eval(), model, load_params(tmp_path, shapes).params


def adapted_by_peft(model, config):
  """PEFT's model with every vector and matrix that it trains random."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own, at import and construction
    model = peft.get_peft_model(model, config).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "vera_lambda" in name or "lora_" in name:
        value.normal_(std=0.3)
  return model


def ours_from(state, model, ids, name_of):
  """Their trained tensors, under our names, stacked by layer."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  leaves = {}
  for path, leaf in flatten_dict(shapes).items():
    if path[-1] in ("vera_d", "vera_b", "lora_A", "lora_B"):
      layers = range(leaf.shape[0]) if path[1] == "layer" else [None]
      modules = [
        module_name(path[:-1], layer=layer, model_type="bert")
        for layer in layers
      ]
      values = [
        state[f"base_model.model.{module}.{name_of(path[-1])}"].numpy()
        for module in modules
      ]
      value = np.stack(values) if path[1] == "layer" else values[0]
      assert value.shape == leaf.shape, path
      leaves[path] = jnp.asarray(value)
  return leaves


def check(model, params, theirs, name_of):
  ids = np.random.default_rng(1).integers(5, 100, (3, 9))
  leaves = ours_from(theirs.state_dict(), model, jnp.asarray(ids), name_of)
  flat = flatten_dict(params) | leaves
  targets = model.find_targets(jnp.asarray(ids))
  projections = model.adapter.projections(targets)
  variables = {"params": unflatten_dict(flat), "projections": projections}
  got = jax.jit(model.apply)(variables, jnp.asarray(ids))[:, 0]
  with torch.no_grad():
    want = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    with theirs.disable_adapter():
      bare = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want - bare).max() > 0.05
  count = sum(v.numel() for v in adapter_tensors(theirs))
  assert count == sum(leaf.size for leaf in leaves.values())


def adapter_tensors(model):
  return [
    value
    for name, value in model.named_parameters()
    if "vera_lambda" in name or "lora_" in name
  ]


@pytest.mark.parametrize("ours, names", TARGETS, ids=["qv", "all"])
def test_vera(ours, names, base):
  peer, model, params = base
  config = peft.VeraConfig(
    r=RANK, projection_prng_key=KEY, target_modules=names
  )
  theirs = adapted_by_peft(peer, config)
  method = vera(RANK, init="peft", projection_seed=KEY)
  adapted = adapt(model, method, targets=ours)
  check(adapted, params, theirs, lambda leaf: f"{VECTORS[leaf]}.default")
  width = 32 if ours == ["query", "value"] else 48  # the widest in, and out
  pair = make_pair(RANK, width, width, seed=KEY, init="peft")
  for name in "AB":
    matrix = getattr(theirs.base_model, f"vera_{name}")["default"].numpy()
    np.testing.assert_array_equal(pair[name], matrix)


@pytest.mark.parametrize("ours, names", TARGETS, ids=["qv", "all"])
def test_lora(ours, names, base):
  peer, model, params = base
  config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
  theirs = adapted_by_peft(peer, config)
  adapted = adapt(model, lora(4, alpha=6.0), targets=ours)
  check(adapted, params, theirs, lambda leaf: f"{leaf}.default.weight")


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32 - 1])
def test_pefts_matrices_bit_for_bit(key):
  model = torch.nn.Sequential(torch.nn.Linear(40, 56))
  config = peft.VeraConfig(r=16, projection_prng_key=key, target_modules=["0"])
  theirs = adapted_by_peft(model, config).base_model
  pair = make_pair(16, 40, 56, seed=key, init="peft")
  np.testing.assert_array_equal(pair["A"], theirs.vera_A["default"].numpy())
  np.testing.assert_array_equal(pair["B"], theirs.vera_B["default"].numpy())
