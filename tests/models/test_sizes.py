"""What a small file says of sizes is held against what is there, before it is
built; and files that lead elsewhere are not weights."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.methods import make_adapter
from vera_jax.errors import UserError
from vera_jax.models.hf_weights import fingerprint, read_model, tensor_files
from vera_jax.models.sizes import check_sizes
from vera_jax.pretrained.classifier import load_classifier, restore_adapter

HUGE = 10**9


@pytest.fixture
def model(tiny_model, tmp_path):
  return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize(
  "name", ["num_hidden_layers", "hidden_size", "num_attention_heads"]
)
def test_a_config_of_a_far_larger_network(name, model):
  fields = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps({**fields, name: HUGE}))
  start = time.process_time()
  with pytest.raises(UserError, match=f"{name} is 1,000,000,000, but the wei"):
    load_classifier(model)
  assert time.process_time() - start < 5


def test_a_config_of_too_many_labels(model):
  fields = json.loads((model / "config.json").read_text())
  fields = {**fields, "id2label": None, "num_labels": HUGE}
  (model / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match="no usable id2label or num_labels"):
    load_classifier(model)


def test_sizes_that_the_weights_have():
  shapes = {f"layer.{i}": (4, 200_000) for i in range(200)}
  check_sizes({"num_hidden_layers": 200, "vocab_size": 200_000}, shapes)
  check_sizes({"num_hidden_layers": 3, "head_dim": 128}, {"a": (2, 2)})
  for fields, name in (
    ({"n_layer": 201}, "n_layer"),
    ({"head_dim": 200_001.0}, "head_dim"),
    ({"image_size": HUGE}, "image_size"),
    ({"stages": [{"layers": 3}, {"layers": HUGE}]}, "layers"),
  ):
    with pytest.raises(UserError, match=f"config.json: {name} is"):
      check_sizes(fields, shapes)


@pytest.mark.parametrize(
  "weights, words",
  [
    ("../private.safetensors", "outside of"),
    ("/dev/zero", "outside of"),
    ("pipe", "it is a pipe"),
    ("gone", "gone, which the index names, is missing"),
    ("a\0b", "no name of a file"),
    ("ß" * 300, "name too long"),
    (3, "has no weight_map"),
  ],
)
def test_an_index_that_names_something_else(weights, words, model):
  shutil.copy(model / "model.safetensors", model / "../private.safetensors")
  os.mkfifo(model / "pipe")
  (model / "model.safetensors").unlink()
  index = json.dumps({"weight_map": {"a": weights}})
  (model / "model.safetensors.index.json").write_text(index)
  with pytest.raises(UserError, match=words):
    fingerprint(model)


def test_weights_and_configs_that_are_links(model):
  elsewhere = model.parent / "elsewhere"
  for name, use in (("model.safetensors", tensor_files), ("config.json", None)):
    (model / name).rename(elsewhere)
    (model / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} is not used: it leads to"):
      (use or read_model)(model)
    (model / name).unlink()
    elsewhere.rename(model / name)


@pytest.fixture
def adapter(random_adapter, tmp_path):
  """Makes a copy of an adapter whose settings, or tensors, are others."""

  def make(method="vera", *, tensors=None, **settings):
    folder = shutil.copytree(random_adapter(method), tmp_path / "adapter")
    about = json.loads((folder / "adapter.json").read_text())
    about["settings"] |= settings
    del about["tensors_sha256"]
    (folder / "adapter.json").write_text(json.dumps(about))
    if tensors:
      file = folder / "adapter.safetensors"
      save_file({**load_file(file), **tensors}, file)
    return folder

  return make


@pytest.mark.parametrize(
  "method, settings",
  [
    ("vera", {"rank": 20_000_000}),
    ("vera", {"rank": 20_000_000, "sharing": "unique"}),
    ("unilora", {"size": HUGE}),
  ],
)
def test_random_matrices_that_are_too_large_are_not_drawn(
  method, settings, adapter
):
  saved = load_adapter(adapter(method, **settings))
  start = time.process_time()
  with pytest.raises(UserError, match="The random matrices would have"):
    restore_adapter(saved)
  assert time.process_time() - start < 10


def test_the_matrices_of_randlora_are_counted(random_adapter):
  sites = restore_adapter(load_adapter(random_adapter())).targets
  made, _ = make_adapter(
    "randlora",
    {
      "rank": 20_000_000,
      "alpha": 1.0,
      "init": "peft",
      "projection_seed": 0,
      "targets": ["query"],
    },
  )
  with pytest.raises(UserError, match="The random matrices would have"):
    made.shared(sites)


def test_a_tensor_of_many_layers_and_no_entries(adapter):
  name = "encoder.layer.0-999999999.output.dense.vera_d"
  folder = adapter(tensors={name: np.zeros((HUGE, 0), np.float32)})
  with pytest.raises(UserError, match="its name says 1000000000 layers"):
    load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_an_adapter_is_not_elsewhere(name, adapter, tmp_path):
  folder = adapter()
  (folder / name).rename(tmp_path / name)
  (folder / name).symlink_to(tmp_path / name)
  with pytest.raises(UserError, match="outside of .*An adapter is the two"):
    load_adapter(folder)
