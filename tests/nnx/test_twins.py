"""tunix's models and their linen twins: one adapter file, the same logits."""

import importlib
import json
import shutil

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

import vera_jax
import vera_jax.nnx
from tests.random_adapter import SETTINGS, write_adapter
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.labels import label_tree, split
from vera_jax.errors import UserError
from vera_jax.models.decoder import logits
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.models.kinds import WORDS
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import restore_adapter

pytest.importorskip("tunix", reason="requirements-tunix.txt is not installed")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # of tunix's dependencies
]
KINDS = {
  "llama": "llama3.Llama3",
  "qwen2": "qwen2.Qwen2",
  "qwen3": "qwen3.Qwen3",
}
SIZES = {"vocab_size": 24, "head_dim": 6, "rope_theta": 1_000_000}
FIELDS = {
  **SIZES,
  "hidden_size": 16,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": False,
}
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 9))
EVERY = ["(q|k|v|o|gate|up|down)_proj"]
IA3 = ["down_proj"]
METHODS = {
  "vera": {"rank": 30, "targets": EVERY},
  "vera unique": {"sharing": "unique", "targets": EVERY},
  "lora": {"targets": EVERY},
  "lora_fa": {"targets": EVERY},
  "lora_xs": {"rank": 3, "alpha": 3.0, "init_std": 0.1, "targets": EVERY},
  "ia3": {"targets": ["o_proj", "up_proj", *IA3], "feedforward": IA3},
  "dora": {"targets": EVERY},
  "dvora": {"targets": EVERY},
  "pvera": {"targets": EVERY},
  "randlora": {"targets": EVERY},
  "unilora": {"targets": EVERY},
  "tied_lora": {"targets": EVERY},
}
BIASES = {
  "bitfit": {"biases": ".*"},
  "vera+bitfit": {
    "vera": {**SETTINGS["vera"], "targets": ["self_attn/[qv]_proj"]},
    "bitfit": {"biases": "[qk]_proj"},
  },
}


@pytest.fixture(autouse=True)
def tunix_adds_arrays_of_different_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Folders of random weights, by family."""
  folders = {}
  for kind in KINDS:
    folder = tmp_path_factory.mktemp(kind)
    fields = {"model_type": kind, **FIELDS}
    (folder / "config.json").write_text(json.dumps(fields))
    made = linen(fields)
    rng = np.random.default_rng(0)
    weights = {
      path: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
      for path, leaf in made.shapes.items()
    }
    save_file(
      to_hf(unflatten_dict(weights), made.config), folder / "model.safetensors"
    )
    folders[kind] = folder
  return folders


def linen(fields, **options):
  head = "language_modelling"
  return blueprint(fields, outputs=1, head=head, scan=False, **options)


def tunix(kind, folder):
  """tunix's model, by its own loader."""
  module, _, name = KINDS[kind].partition(".")
  of = importlib.import_module(f"tunix.models.{module}.model")
  params = importlib.import_module(f"tunix.models.{module}.params")
  config = of.ModelConfig(
    **SIZES,
    num_layers=2,
    embed_dim=16,
    hidden_dim=20,
    num_heads=4,
    num_kv_heads=2,
    norm_eps=1e-5,
  )
  model = params.create_model_from_safe_tensors(str(folder), config)
  assert type(model).__name__ == name
  return model


def of_tunix(model):
  rows, length = TOKENS.shape
  causal = jnp.tril(jnp.ones((length, length), bool))
  return model(
    jnp.asarray(TOKENS),
    positions=jnp.tile(jnp.arange(length), (rows, 1)),
    cache=None,
    attention_mask=jnp.tile(causal, (rows, 1, 1)),
  )[0]


def of_linen(folder, **options):
  model = restore_adapter(load_adapter(folder), **options)
  return logits(model.module.apply(model.variables, jnp.asarray(TOKENS)))


def assert_close(found, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def with_noise(model):
  leaves = nnx.state(model, nnx.LoRAParam)
  rng = np.random.default_rng(1)
  nnx.update(
    model, jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), leaves)
  )
  return model


@pytest.mark.parametrize(
  "kind, method",
  [
    *(("llama", method) for method in METHODS),
    *(("qwen2", method) for method in ("vera", *BIASES)),
    *(("qwen3", method) for method in ("vera unique", "dora")),
  ],
)
def test_one_file_for_both(bases, kind, method, tmp_path):
  base, settings = bases[kind], (METHODS | BIASES)[method]
  ours, theirs = tmp_path / "ours", tmp_path / "theirs"
  name = method.partition(" ")[0]
  write_adapter(ours, name, base=base, kind=WORDS, **settings)
  model = vera_jax.nnx.load(ours, tunix(kind, base))
  expected = of_linen(ours)
  assert_close(of_tunix(model), expected)

  vera_jax.nnx.save(theirs, model, base=base, about={"template": "plain"})
  written, again = load_adapter(ours), load_adapter(theirs)
  assert written.tensors.keys() == again.tensors.keys()
  for leaf, value in written.tensors.items():
    np.testing.assert_array_equal(again.tensors[leaf], value, leaf)
  for field in (
    "method",
    "base",
    "base_fingerprint",
    "projection_digest",
    "kind",
  ):
    assert again.about[field] == written.about[field], field
  np.testing.assert_array_equal(of_linen(theirs), expected)
  assert_close(of_linen(theirs, scan=False), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_of_one_s_own(bases, kind, tmp_path):
  """Without a base named: `Adapted.save` and `load`, on the twin's weights."""
  model = vera_jax.nnx.adapt(
    tunix(kind, bases[kind]),
    vera_jax.vera(rank=30, sharing="unique"),
    targets=EVERY,
    rngs=nnx.Rngs(0),
  )
  vera_jax.nnx.save(tmp_path / "a", with_noise(model))
  fields = json.loads((bases[kind] / "config.json").read_text())
  made = linen(
    fields, adapter=(vera_jax.vera(rank=30, sharing="unique"), tuple(EVERY))
  )
  weights = load_params(bases[kind], unflatten_dict(made.shapes)).params
  weights = jax.tree.map(jnp.asarray, weights)
  variables = made.module.load(tmp_path / "a", {"params": weights}, TOKENS)
  words = made.module.apply(variables, jnp.asarray(TOKENS))
  assert_close(of_tunix(model), logits(words))

  labels = label_tree(variables["params"], made.adapter, head="")
  trained, _ = split(variables["params"], labels)
  made.module.save(tmp_path / "b", trained, variables)
  again = vera_jax.nnx.load(tmp_path / "b", tunix(kind, bases[kind]))
  np.testing.assert_array_equal(of_tunix(again), of_tunix(model))
  digests = [
    load_adapter(tmp_path / name).about["base_fingerprint"] for name in "ab"
  ]
  assert digests[0] == digests[1]

  merged = vera_jax.nnx.merge(model).layers[1].attn.v_proj.w.get_value()
  before = tunix(kind, bases[kind]).layers[1].attn.v_proj.w.get_value()
  lora = nnx.to_pure_dict(vera_jax.nnx.to_lora(model))
  lora = lora["layers"][1]["attn"]["v_proj"]
  delta = jnp.tensordot(lora["w_lora_a"], lora["w_lora_b"], 1)
  np.testing.assert_allclose(merged - before, delta, atol=2e-6)


def test_refused(bases, tmp_path):
  plain = tunix("llama", bases["llama"])
  model = vera_jax.nnx.adapt(plain, vera_jax.vera(rank=8), targets=["q_proj"])
  other = "not have the weights of .*: other or missing"
  with pytest.raises(UserError, match=other):
    vera_jax.nnx.save(tmp_path / "a", model, base=bases["qwen3"])
  kernel = model.layers[1].mlp.up_proj.kernel
  kernel.set_value(kernel.get_value().at[0, 0].add(1e-3))
  with pytest.raises(
    UserError, match="missing are encoder/layer_1/mlp/up_proj/kernel"
  ):
    vera_jax.nnx.save(tmp_path / "a", model, base=bases["llama"])
  assert not (tmp_path / "a").exists()
  kernel.set_value(kernel.get_value().at[0, 0].add(-1e-3))

  model = vera_jax.nnx.adapt(
    tunix("llama", bases["llama"]), vera_jax.vera(rank=8), targets=[".*"]
  )
  with pytest.raises(UserError, match=r"other layers .*embed_tokens, lm_head"):
    vera_jax.nnx.save(tmp_path / "a", model, base=bases["llama"])
  vera_jax.nnx.save(tmp_path / "a", with_noise(model))
  again = vera_jax.nnx.load(tmp_path / "a", tunix("llama", bases["llama"]))
  np.testing.assert_array_equal(of_tunix(again), of_tunix(model))

  write_adapter(tmp_path / "b", base=bases["llama"], kind=WORDS, targets=EVERY)
  moved = tmp_path / "moved"
  shutil.move(shutil.copytree(bases["llama"], tmp_path / "copy"), moved)
  about = tmp_path / "b" / "adapter.json"
  fields = json.loads(about.read_text()) | {"base": str(tmp_path / "copy")}
  about.write_text(json.dumps(fields))
  plain = tunix("llama", bases["llama"])
  with pytest.raises(UserError, match="is not here; name its folder"):
    vera_jax.nnx.load(tmp_path / "b", plain)
  expected = of_linen(tmp_path / "b", base=moved)
  model = vera_jax.nnx.load(tmp_path / "b", plain, base=moved)
  assert_close(of_tunix(model), expected)

  about.write_text(
    json.dumps(fields | {"codes_digest": "0", "quantise": "nf4"})
  )
  with pytest.raises(UserError, match="on a base in nf4 codes"):
    vera_jax.nnx.load(tmp_path / "b", tunix("llama", moved), base=moved)
  about.write_text(json.dumps(fields))

  with pytest.raises(UserError, match="no table of names for"):
    small = nnx.Dict(q_proj=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    vera_jax.nnx.load(tmp_path / "b", small, base=moved)
  with pytest.raises(UserError, match="scales the bias of .*k_proj"):
    vera_jax.nnx.adapt(
      tunix("qwen2", bases["qwen2"]), vera_jax.ia3(), targets=["k_proj"]
    )
