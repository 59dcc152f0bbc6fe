"""The adapter's two files: names, shapes, values, damage."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_jax.adapters.files import (
  FORMAT,
  SHA256,
  load_adapter,
  save_adapter,
  stack_layers,
  tensors,
)
from vera_jax.adapters.labels import split
from vera_jax.errors import UserError


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
  assert about == {"targets": ["query"], "format": FORMAT, SHA256: checksum}
  stored = load_file(folder / "adapter.safetensors")
  assert {name: x.shape for name, x in stored.items()} == {
    "encoder.layer.0-1.attention.self.query.vera_d": (2, 3),
    "encoder.layer.0-1.attention.self.query.vera_b": (2, 4),
    "classifier.kernel": (4, 2),
    "classifier.bias": (2,),
  }


def test_what_was_saved_is_read(random_adapter):
  folder = random_adapter()
  saved = load_adapter(str(folder))
  assert saved.folder == folder
  assert saved.about["settings"]["rank"] == 8
  stored = load_file(folder / "adapter.safetensors")
  name = "encoder.layer.{}.attention.self.value.vera_b"
  for layer in (0, 1):
    np.testing.assert_array_equal(
      saved.tensors[name.format(layer)], stored[name.format("0-1")][layer]
    )
  assert len(saved.tensors) == 2 * len(stored) - 2  # the head has no layers


def test_the_first_format_is_read(random_adapter, tmp_path):
  """A tensor a layer, and no number that says so."""
  folder = shutil.copytree(random_adapter(), tmp_path / "old")
  saved = load_adapter(folder)
  save_file(saved.tensors, folder / "adapter.safetensors")
  data = (folder / "adapter.safetensors").read_bytes()
  checksum = hashlib.sha256(data).hexdigest()
  change(folder, format="gone", **{SHA256: checksum})
  old = load_adapter(folder)
  assert old.tensors.keys() == saved.tensors.keys()
  for name, value in saved.tensors.items():
    np.testing.assert_array_equal(old.tensors[name], value)


ROBERTA = {
  "base": (768, 12, 12, 3072),
  "large": (1024, 24, 16, 4096),
}
EVERYWHERE = ["query", "key", "value", "dense"]
SETTINGS = {
  "vera": {
    "d_init": 0.1,
    "init": "kaiming_uniform",
    "projection_seed": 0,
    "train": "both",
    "sharing": "shared",
    "targets": ["query", "value"],
  },
  "lora": {"alpha": 4.0, "targets": ["query", "value"]},
}


def trained_shapes(size, method, **settings):
  """What a method trains of RoBERTa, as a tree of shapes, and its settings."""
  width, layers, heads, inner = ROBERTA[size]
  fields = roberta(width, layers) | {"intermediate_size": inner}
  settings = {**SETTINGS.get(method, {}), **settings}
  made = blueprint(fields, outputs=3, method=method, settings=settings)
  shapes = jax.eval_shape(made.module.init, jax.random.key(0), **made.inputs)[
    "params"
  ]
  return split(shapes, made.label(shapes))[0], settings


def about_a_run(settings):
  """As long as what `train.loop` writes, or longer."""
  return {
    "task": "generated_entailment",
    "base": "package:some_package_with_a_long_name/and_a_folder_in_it",
    "base_fingerprint": 64 * "0",
    "projection_digest": 64 * "0",
    "labels": ["entailment", "neutral", "contradiction"],
    "settings": settings,
    "versions": dict.fromkeys((12 * x for x in "abcdefghi"), "10.20.30"),
    "parameters": dict.fromkeys(("adapter", "head", "frozen"), 10**9),
  }


@pytest.mark.parametrize(
  "size, method, settings, adapter",
  [
    ("base", "vera", {"rank": 1024}, 43_008),
    ("large", "vera", {"rank": 256}, 61_440),
    ("large", "vera", {"rank": 256, "targets": EVERYWHERE}, None),
    ("large", "lora", {"rank": 8}, 786_432),
    ("large", "lora", {"rank": 1, "targets": EVERYWHERE}, None),
    ("large", "bitfit", {}, None),
    ("large", "head", {}, 0),
  ],
)
def test_the_files_are_small(size, method, settings, adapter, tmp_path):
  """At most 4 bytes a trained number and 16 KiB, RoBERTa's own shapes."""
  shapes, settings = trained_shapes(size, method, **settings)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  save_adapter(tmp_path, zeros, about=about_a_run(settings))
  numbers = sum(leaf.size for leaf in flatten_dict(zeros).values())
  width = ROBERTA[size][0]
  if adapter is not None:
    assert numbers == adapter + width * width + 4 * width + 3
  found = sum(file.stat().st_size for file in tmp_path.iterdir())
  assert found <= 4 * numbers + 16 * 1024
  with safe_open(tmp_path / "adapter.safetensors", "numpy") as file:
    assert len(list(file.keys())) <= 32


def test_the_header_of_a_whole_model_is_short():
  """`full` on RoBERTa-large, counted: its 1.4 GB need not be written."""
  shapes, _ = trained_shapes("large", "full")
  numbers = {
    path: np.zeros(leaf.shape[:1] if "layer" in path else ())
    for path, leaf in flatten_dict(shapes).items()
  }
  names = stack_layers(tensors(unflatten_dict(numbers)))
  entry = len('{"dtype":"F32","shape":[50265,1024],"data_offsets":[,]},:""')
  digits = 2 * len("1400000000") + len("24,")
  header = sum(len(name) + entry + digits for name in names)
  assert 20 < len(names) < 40
  assert header + 4096 <= 16 * 1024


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


def no_layer(folder):
  stored = load_file(folder / "adapter.safetensors")
  name = "encoder.layer.0-1.attention.self.query.vera_d"
  stored[name] = stored[name][:1]
  save_file(stored, folder / "adapter.safetensors")
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
    (
      lambda f: change(f, format=FORMAT + 1),
      f"has format {FORMAT + 1}; .* up to {FORMAT}",
    ),
    (lambda f: change(f, format="new"), "has format 'new'"),
    (cut, "checksum differs"),
    (flip, "checksum differs"),
    (unsigned_cut, "no whole safetensors file"),
    (no_layer, "vera_d has shape .* says 2 layers"),
    (no_number, "classifier.bias holds values that are not finite"),
  ],
)
def test_damage_is_told(harm, words, random_adapter, tmp_path):
  folder = shutil.copytree(random_adapter(), tmp_path / "adapter")
  harm(folder)
  with pytest.raises(UserError, match=words):
    load_adapter(folder)
