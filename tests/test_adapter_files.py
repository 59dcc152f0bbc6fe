"""The adapter's two files: names, shapes, values, damage."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from vera_jax.adapter_files import (
  SHA256,
  load_adapter,
  save_adapter,
  tensors,
)
from vera_jax.apply import adapt
from vera_jax.errors import UserError
from vera_jax.labels import label_tree, split
from vera_jax.methods import make_adapter
from vera_jax.models.bert import BertClassifier, BertConfig


def make(scan: bool):
  """Two layers' vectors, 0 and 1, and a head."""
  layers = [
    {
      "attention": {
        "self": {
          "query": {
            "vera_d": np.full(3, i, np.float32),
            "vera_b": np.full(4, 10 + i, np.float32),
          }
        }
      }
    }
    for i in range(2)
  ]
  stacked = {
    "layer": {
      "attention": {
        "self": {
          "query": {
            name: np.stack(
              [x["attention"]["self"]["query"][name] for x in layers]
            )
            for name in ("vera_d", "vera_b")
          }
        }
      }
    }
  }
  looped = {f"layer_{i}": layer for i, layer in enumerate(layers)}
  head = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2)}
  return {"encoder": stacked if scan else looped, "classifier": head}


def test_a_stack_is_taken_apart():
  assert {name: x.shape for name, x in tensors(make(True)).items()} == {
    "encoder.layer.0.attention.self.query.vera_d": (3,),
    "encoder.layer.1.attention.self.query.vera_d": (3,),
    "encoder.layer.0.attention.self.query.vera_b": (4,),
    "encoder.layer.1.attention.self.query.vera_b": (4,),
    "classifier.kernel": (4, 2),
    "classifier.bias": (2,),
  }
  assert tensors(make(True))[
    "encoder.layer.1.attention.self.query.vera_b"
  ].tolist() == [11, 11, 11, 11]


def test_scanned_and_looped_stacks_give_the_same_files(tmp_path):
  for scan in (True, False):
    save_adapter(tmp_path / f"{scan}", make(scan), about={"method": "vera"})
  one, two = (
    (tmp_path / name / "adapter.safetensors").read_bytes()
    for name in ("True", "False")
  )
  assert one == two


def test_both_files_are_there(tmp_path):
  folder = tmp_path / "new" / "adapter"
  save_adapter(folder, make(True), about={"targets": ("query",)})
  about = json.loads((folder / "adapter.json").read_text())
  data = (folder / "adapter.safetensors").read_bytes()
  checksum = hashlib.sha256(data).hexdigest()
  assert about == {"targets": ["query"], SHA256: checksum}
  loaded = load_file(folder / "adapter.safetensors")
  for name, value in tensors(make(True)).items():
    np.testing.assert_array_equal(loaded[name], value)


def test_what_was_saved_is_read(random_adapter):
  folder = random_adapter()
  saved = load_adapter(str(folder))
  assert saved.folder == folder
  assert saved.about["settings"]["rank"] == 8
  stored = load_file(folder / "adapter.safetensors")
  assert saved.tensors.keys() == stored.keys()
  for name, value in stored.items():
    np.testing.assert_array_equal(saved.tensors[name], value)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_files_are_small(size, tmp_path):
  """At most 4 bytes a trained number and 16 KiB, RoBERTa's own shapes."""
  large = size == "large"
  config = BertConfig(
    model_type="roberta",
    vocab_size=50265,
    hidden_size=1024 if large else 768,
    num_hidden_layers=24 if large else 12,
    num_attention_heads=16 if large else 12,
    intermediate_size=4096 if large else 3072,
    max_position_embeddings=514,
    pad_token_id=1,
  )
  settings = {
    "rank": 256 if large else 1024,
    "d_init": 0.1,
    "init": "kaiming_uniform",
    "projection_seed": 0,
    "train": "both",
    "sharing": "shared",
    "targets": ["query", "value"],
  }
  adapter, targets = make_adapter("vera", settings)
  model = adapt(BertClassifier(config, 3), adapter, targets=targets)
  ids = jax.ShapeDtypeStruct((1, 8), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  trained, _ = split(shapes, label_tree(shapes, "vera"))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), trained)
  about = {"settings": settings, "versions": dict.fromkeys("abcdefgh", "0.0.0")}
  save_adapter(tmp_path, zeros, about=about)
  numbers = sum(leaf.size for leaf in flatten_dict(zeros).values())
  assert numbers == (61_440 if large else 43_008) + (
    1024 * 1024 + 4 * 1024 + 3 if large else 768 * 768 + 4 * 768 + 3
  )
  size_on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
  assert size_on_disk <= 4 * numbers + 16 * 1024


def cut(folder):
  file = folder / "adapter.safetensors"
  file.write_bytes(file.read_bytes()[:-9])


def flip(folder):
  file = folder / "adapter.safetensors"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)


def change(folder, **fields):
  file = folder / "adapter.json"
  about = {**json.loads(file.read_text()), **fields}
  gone = [name for name, value in about.items() if value == "gone"]
  file.write_text(json.dumps({k: about[k] for k in about if k not in gone}))


def unsigned_cut(folder):
  cut(folder)
  change(folder, **{SHA256: "gone"})


def no_number(folder):
  stored = load_file(folder / "adapter.safetensors")
  stored["classifier.bias"][0] = np.nan
  save_file(stored, folder / "adapter.safetensors")
  change(folder, **{SHA256: "gone"})


@pytest.mark.parametrize(
  "harm, words",
  [
    (shutil.rmtree, "There is no adapter folder"),
    (lambda f: (f / "adapter.json").unlink(), "There is no .*adapter.json"),
    (
      lambda f: (f / "adapter.safetensors").unlink(),
      "adapter.safetensors can't be read",
    ),
    (lambda f: (f / "adapter.json").write_text("{"), "read as JSON"),
    (lambda f: (f / "adapter.json").write_bytes(b"\xff"), "read as JSON"),
    (lambda f: (f / "adapter.json").write_text("[]"), "not a JSON object"),
    (
      lambda f: change(f, method=3, base_fingerprint="gone"),
      "no usable method, base_fingerprint",
    ),
    (cut, "checksum differs"),
    (flip, "checksum differs"),
    (unsigned_cut, "no whole safetensors file"),
    (no_number, "classifier.bias holds values that are not finite"),
  ],
)
def test_damage_is_told(harm, words, random_adapter, tmp_path):
  folder = shutil.copytree(random_adapter(), tmp_path / "adapter")
  harm(folder)
  with pytest.raises(UserError, match=words):
    load_adapter(folder)
