"""EfficientNet-Lite: torch's logits, frozen statistics, and whole runs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from configs.images import cifar10
from experiments.convert import package_file
from experiments.convert_efficientnet import (
  FILE,
  FOLDER,
  LITE0,
  PACKAGE,
  SHA256,
  named_as_here,
  read_state,
)
from tests.networks import LITE, paths_of, write_lite
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.labels import FROZEN
from vera_jax.adapters.methods import settings_in
from vera_jax.data.images import read_processor
from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.models.family import config_of, read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.models.other_networks.depthwise import depthwise
from vera_jax.models.other_networks.efficientnet import BatchNorm
from vera_jax.peft_io.base import open_base
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve.image_predictor import ImagePredictor
from vera_jax.train.loop import train_and_evaluate


@pytest.mark.parametrize(
  "tall, wide, taps, stride", [(5, 6, 3, 1), (5, 6, 3, 2), (7, 4, 5, 2)]
)
def test_depthwise_is_laxs_and_so_are_its_gradients(tall, wide, taps, stride):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, tall, wide, 3)).astype(np.float32)
  kernel = rng.standard_normal((taps, taps, 1, 3)).astype(np.float32)
  options = dict(lhs_dilation=(1, 1), rhs_dilation=None, feature_group_count=3)

  def found(function):
    def loss(x, kernel):
      y = function(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
      )
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)

  for want, got in zip(
    jax.tree.leaves(found(lax.conv_general_dilated)),
    jax.tree.leaves(found(depthwise)),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="no depthwise"):
    depthwise(jnp.asarray(x), jnp.asarray(kernel), (1, 1), "VALID", **options)


def test_batch_norm_has_its_statistics_stored():
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, 3, 3, 4)).astype(np.float32)
  leaves = {
    name: rng.random(4).astype(np.float32) + 0.5
    for name in ("scale", "bias", "mean", "var")
  }
  norm = BatchNorm(1e-3, jnp.float32, jnp.float32)
  scale, bias, mean, var = leaves.values()
  want = (x - mean) / np.sqrt(var + 1e-3) * scale + bias
  got = norm.apply({"params": leaves}, jnp.asarray(x))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["norms", "bitfit", "head", "full"])
def test_running_statistics_are_trained_by_no_method(method):
  settings = {"biases": ".*"}
  plan = blueprint(LITE, outputs=3, method=method, settings=settings)
  labels = flatten_dict(plan.label(unflatten_dict(plan.shapes)))
  trained = {p for p, label in labels.items() if label != FROZEN}
  assert not {path[-1] for path in trained} & {"mean", "var"}
  kinds = {
    "norms": {"scale", "bias"},
    "bitfit": {"bias"},
    "head": set(),
    "full": {"scale", "bias", "kernel"},
  }[method]
  base = {p for p in trained if p[0] != "classifier"}
  assert {path[-1] for path in base} == kinds
  assert all("norm" in p[-2] for p in base if p[-1] != "kernel")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"num_channels": 1}, "num_channels is 1"),
    ({"stages": []}, "there are no stages"),
    ({"stages": [{"layers": 1}]}, "no usable fields"),
    ({"stem_width": 0}, "0 is no size"),
  ],
)
def test_what_the_model_cannot_honour(changes, words):
  with pytest.raises(UserError, match=words):
    config_of({**LITE, **changes})


@pytest.fixture(scope="module")
def tiny_lite(tmp_path_factory):
  return write_lite(tmp_path_factory.mktemp("tiny_lite"))


def make_config(tiny_lite, tiny_images, cache, **changes):
  config = cifar10.get_config("efficientnet_lite0")
  settings = {
    "model.name": str(tiny_lite),
    "data.source": str(tiny_images),
    "data.cache_dir": str(cache),
    "data.image_size": 8,
    "data.shots": 4,
    "optim.epochs": 2,
    "optim.batch_size": 6,
    "optim.adapter_lr": 0.05,
    "optim.head_lr": 0.05,
    "eval_batch_size": 12,
  }
  config.update_from_flattened_dict({**settings, **changes})
  return config


@pytest.mark.slow
def test_a_run_its_adapter_and_the_merged_folder(
  tiny_lite, tiny_images, tmp_path
):
  """VeRA with the norms trained: of the base only these move."""
  config = make_config(tiny_lite, tiny_images, tmp_path, method="vera+norms")
  result = train_and_evaluate(config, tmp_path / "run")
  assert result["parameters"]["adapter"] > 0
  saved = load_adapter(tmp_path / "run/adapter")
  assert not any("running" in name for name in saved.tensors)
  classifier = restore_adapter(saved)
  base = load_params(
    tiny_lite, unflatten_dict(blueprint(LITE, outputs=3).shapes)
  ).params
  for path, leaf in flatten_dict(base).items():
    same = np.array_equal(leaf, flatten_dict(classifier.params)[path])
    assert same == (path[-1] not in ("scale", "bias")), path
  write_merged(classifier, tmp_path / "merged")
  merged = load_classifier(tmp_path / "merged")
  assert merged.labels == classifier.labels == ("blue", "green", "red")
  files = sorted(Path(tiny_images, "test").glob("*/0.png"))
  want, got = (
    ImagePredictor(model, image_size=8).logits(files)
    for model in (classifier, merged)
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_is_refused_by_name(tiny_lite, tiny_images, tmp_path):
  with pytest.raises(UserError, match="transformers has no class"):
    open_base(str(tiny_lite), {})
  config = make_config(tiny_lite, tiny_images, tmp_path)
  config.model.quantise, config.method = "int8", "norms"
  with pytest.raises(UserError, match="no kernel of the model"):
    train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
  "method, count", [("vera", 14_064), ("lora", 91_136), ("ia3", 8_960)]
)
def test_adapters_on_the_real_shapes(method, count):
  """VeRA and LoRA on the 32 pointwise convolutions, IA3 on the others."""
  config = cifar10.get_config("efficientnet_lite0")
  settings = settings_in(config, method)
  plan = blueprint(LITE0, outputs=10, method=method, settings=settings)
  own, shared = plan.own_shapes()
  assert sum(leaf.size for leaf in jax.tree.leaves(own)) == count
  pair = 64 * (1152 + 1280) if method == "vera" else 0
  assert sum(leaf.size for leaf in jax.tree.leaves(shared)) == pair


def torch_logits(state, pixels):
  """Written from torch's own operations, by the names in the file."""
  import torch
  from torch.nn import functional

  state = {name: torch.from_numpy(x) for name, x in state.items()}

  def filtered(x, conv, norm, stride=1):
    kernel = state[f"{conv}.weight"]
    size, width = kernel.shape[-1], x.shape[-1]
    total = max((-(-width // stride) - 1) * stride + size - width, 0)
    x = functional.pad(x, (total // 2, total - total // 2) * 2)
    groups = x.shape[1] // kernel.shape[1]
    x = functional.conv2d(x, kernel, stride=stride, groups=groups)
    leaves = ("running_mean", "running_var", "weight", "bias")
    own = [state[f"{norm}.{leaf}"] for leaf in leaves]
    return functional.batch_norm(x, *own, eps=1e-3)

  x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
  x = functional.relu6(filtered(x, "_conv_stem", "_bn0", 2))
  for i in range(16):
    block = f"_blocks.{i}."
    y = x
    if f"{block}_expand_conv.weight" in state:
      y = functional.relu6(filtered(y, f"{block}_expand_conv", f"{block}_bn0"))
    stride = 2 if i in (1, 3, 5, 11) else 1
    y = filtered(y, f"{block}_depthwise_conv", f"{block}_bn1", stride)
    y = filtered(functional.relu6(y), f"{block}_project_conv", f"{block}_bn2")
    x = x + y if x.shape == y.shape else y
  x = functional.relu6(filtered(x, "_conv_head", "_bn1")).mean((2, 3))
  return (x @ state["_fc.weight"].T + state["_fc.bias"]).numpy()


@pytest.mark.parity
def test_the_real_networks_logits_are_torchs_and_name_two_photographs():
  """Of ImageNet's classes the palace's and the daisy's, at 224 pixels, when
  prepared as the folder says and cut out of 256."""
  pytest.importorskip("torch")
  from PIL import Image
  from sklearn.datasets import load_sample_images

  if not FOLDER.exists():
    pytest.skip("EfficientNet-Lite0 is not here: make networks")
  folder = FOLDER
  plan = blueprint(read_fields(folder), outputs=1000)
  loaded = load_params(folder, unflatten_dict(plan.shapes))
  assert loaded.missing == ("classifier/bias", "classifier/kernel")
  assert not loaded.unexpected
  state = read_state(package_file(PACKAGE, FILE, sha256=SHA256))
  assert paths_of(loaded.params) and len(named_as_here(state)) == 49 * 5
  head = {"kernel": state["_fc.weight"].T, "bias": state["_fc.bias"]}
  params = {**loaded.params, "classifier": head}
  flat = flatten_dict(params).items()
  trained = [x.size for p, x in flat if p[-1] not in ("mean", "var")]
  assert sum(trained) == 4_652_008
  processor = read_processor(folder)._replace(edge=256)
  photos = [Image.fromarray(x) for x in load_sample_images().images]
  pixels = processor.normalise(np.stack([processor.prepare(x) for x in photos]))
  run = jax.jit(plan.module.apply)
  got = np.asarray(run({"params": params}, pixels))[:, 0]
  np.testing.assert_allclose(got, torch_logits(state, pixels), atol=1e-4)
  assert got.argmax(-1).tolist() == [698, 985]
  small = pixels[:, :75, :75]
  got = run({"params": params}, small)[:, 0]
  np.testing.assert_allclose(got, torch_logits(state, small), atol=1e-4)
  fields = json.loads((folder / "preprocessor_config.json").read_text())
  assert fields["image_std"] == [128 / 255] * 3
