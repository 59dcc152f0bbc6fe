"""The adapter's two files: names, shapes, values, sizes, damage."""

import errno
import hashlib
import json
import os
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
  unstack_layers,
)
from vera_jax.adapters.labels import split
from vera_jax.errors import UserError
from vera_jax.models.paper_sizes import SIZES, roberta
from vera_jax.pretrained.blueprint import blueprint

HEAD = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2)}


ABOUT = {
  "method": "vera",
  "settings": {},
  "base": None,
  "base_fingerprint": "",
  "labels": [],
  "projection_prng": "threefry2x32",
  "projection_digest": None,
}


def make(scan: bool):
  """Two layers' vectors, 0 and 1, and a head."""

  def query(d, b):
    return {"attention": {"self": {"query": {"vera_d": d, "vera_b": b}}}}

  d, b = (np.array([x], np.float32).repeat(n) for x, n in ((0, 3), (10, 4)))
  if scan:
    layers = {"layer": query(np.stack([d, d + 1]), np.stack([b, b + 1]))}
  else:
    layers = {"layer_0": query(d, b), "layer_1": query(d + 1, b + 1)}
  return {"encoder": layers, "classifier": HEAD}


@pytest.mark.parametrize("scan", [True, False])
def test_both_files_are_there(tmp_path, scan):
  folder = tmp_path / "new" / "adapter"
  save_adapter(folder, make(scan), about={**ABOUT, "targets": ("query",)})
  about = json.loads((folder / "adapter.json").read_text())
  data = (folder / "adapter.safetensors").read_bytes()
  checksum = hashlib.sha256(data).hexdigest()
  added = {"targets": ["query"], "format": FORMAT, SHA256: checksum}
  assert about == {**ABOUT, **added}
  stored = load_file(folder / "adapter.safetensors")
  assert {name: x.tolist() for name, x in stored.items()} == {
    "encoder.layer.0-1.attention.self.query.vera_d": [[0] * 3, [1] * 3],
    "encoder.layer.0-1.attention.self.query.vera_b": [[10] * 4, [11] * 4],
    "classifier.kernel": [[1, 1]] * 4,
    "classifier.bias": [0, 0],
  }


def test_leaves_are_read_in_the_same_order_each_time(random_adapter):
  folder = random_adapter()
  assert len({tuple(load_adapter(folder).tensors) for _ in range(5)}) == 1


def test_what_was_saved_is_read(random_adapter):
  folder = random_adapter()
  saved = load_adapter(str(folder))
  assert saved.folder == folder and saved.about["settings"]["rank"] == 8
  file = folder / "adapter.safetensors"
  stored = load_file(file)
  name = "encoder.layer.{}.attention.self.value.vera_b"
  for layer in (0, 1):
    np.testing.assert_array_equal(
      saved.tensors[name.format(layer)], stored[name.format("0-1")][layer]
    )
  assert len(saved.tensors) == 2 * len(stored) - 2  # the head has no layers


def numbered(layers, width=3, kind=np.float32, role="query.vera_d"):
  return {f"encoder.layer.{i}.{role}": np.full(width, i, kind) for i in layers}


@pytest.mark.parametrize(
  "layers, names",
  [
    (numbered(range(12)), ["0-11.query"]),
    (numbered([5, 0, 2, 1, 10]), ["0-2.query", "5-5.query", "10-10.query"]),
    (numbered([0, 1]) | numbered([2], width=4), ["0-1.query", "2-2.query"]),
    (
      numbered([0, 1]) | numbered([2], kind=np.float64),
      ["0-1.query", "2-2.query"],
    ),
    (
      numbered([0, 1]) | numbered([0, 1], role="output.2.vera_d"),
      ["0-1.query", "0-1.output.2"],
    ),
    ({}, []),
  ],
)
def test_layers_are_stacked_and_taken_apart(layers, names):
  whole = {"classifier.bias": np.zeros(2, np.float32), **layers}
  stacked = stack_layers(whole)
  names = [f"encoder.layer.{name}.vera_d" for name in names]
  assert list(stacked) == ["classifier.bias", *names]
  for back in (unstack_layers(stacked), unstack_layers(whole)):
    assert back.keys() == whole.keys()
    for name, value in whole.items():
      np.testing.assert_array_equal(back[name], value)
      assert back[name].dtype == value.dtype


@pytest.mark.parametrize(
  "layers, shape", [("0-2", (2, 3)), ("3-1", (1, 3)), ("0-1", ())]
)
def test_other_layers_than_the_name_says(layers, shape):
  wrong = {f"encoder.layer.{layers}.query.vera_d": np.zeros(shape)}
  with pytest.raises(UserError, match="vera_d has shape .* its name says"):
    unstack_layers(wrong)


EVERYWHERE = ["query", "key", "value", "dense"]
SETTINGS = {
  "vera": {
    "d_init": 0.1,
    "init": "kaiming_uniform",
    "projection_seed": 0,
    "train": "both",
    "sharing": "shared",
    "conv": "whole",
    "targets": ["query", "value"],
  },
  "lora": {"alpha": 4.0, "scaling": "rank", "targets": ["query", "value"]},
}


def trained_shapes(size, method, **settings):
  """What a method trains of RoBERTa, as a tree of shapes."""
  settings = {**SETTINGS.get(method, {}), **settings}
  fields = roberta(*SIZES[f"roberta-{size}"])
  made = blueprint(fields, outputs=3, method=method, settings=settings)
  shapes = jax.eval_shape(made.module.init, jax.random.key(0), **made.inputs)
  return split(shapes["params"], made.label(shapes["params"]))[0]


@pytest.mark.parametrize(
  "size, method, settings, adapter",
  [
    ("base", "vera", {"rank": 1024}, 43_008),
    ("large", "vera", {"rank": 256}, 61_440),
    ("large", "vera", {"rank": 256, "targets": EVERYWHERE}, None),
    ("large", "lora", {"rank": 8}, 786_432),
    ("large", "lora", {"rank": 1, "targets": EVERYWHERE}, None),
    ("large", "bitfit", {"biases": ".*"}, None),
    ("large", "head", {}, 0),
  ],
)
def test_the_files_are_small(size, method, settings, adapter, tmp_path):
  """At most 4 bytes a trained number and 16 KiB, RoBERTa's own shapes."""
  shapes = trained_shapes(size, method, **settings)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  about = {  # as long as what a run writes, or longer
    **ABOUT,
    "task": "generated_entailment",
    "base": "package:some_package_with_a_long_name/and_a_folder_in_it",
    "base_fingerprint": 64 * "0",
    "projection_digest": 64 * "0",
    "labels": ["entailment", "neutral", "contradiction"],
    "settings": {**SETTINGS.get(method, {}), **settings},
    "versions": dict.fromkeys((12 * x for x in "abcdefghi"), "10.20.30"),
    "parameters": dict.fromkeys(("adapter", "head", "frozen"), 10**9),
  }
  save_adapter(tmp_path, zeros, about=about)
  numbers = sum(leaf.size for leaf in flatten_dict(zeros).values())
  width, _ = SIZES[f"roberta-{size}"]
  if adapter is not None:
    assert numbers == adapter + width * width + 4 * width + 3
  found = sum(file.stat().st_size for file in tmp_path.iterdir())
  assert found <= 4 * numbers + 16 * 1024
  with safe_open(tmp_path / "adapter.safetensors", "numpy") as file:
    assert len(list(file.keys())) <= 32


def test_the_header_of_a_whole_model_is_short():
  """`full` on RoBERTa-large, counted: its 1.4 GB need not be written."""
  numbers = {
    path: np.zeros(leaf.shape[:1] if "layer" in path else ())
    for path, leaf in flatten_dict(trained_shapes("large", "full")).items()
  }
  names = stack_layers(tensors(unflatten_dict(numbers)))
  entry = len('{"dtype":"F32","shape":[50265,1024],"data_offsets":[,]},:""')
  digits = 2 * len("1400000000") + len("24,")
  header = sum(len(name) + entry + digits for name in names)
  assert 20 < len(names) < 40
  assert header + 4096 <= 16 * 1024


def change(folder, **fields):
  """Other fields in adapter.json; None takes one out."""
  file = folder / "adapter.json"
  about = {**json.loads(file.read_text()), **fields}
  file.write_text(json.dumps({k: x for k, x in about.items() if x is not None}))


def damage(folder, edit, **fields):
  """Other bytes in adapter.safetensors."""
  file = folder / "adapter.safetensors"
  file.write_bytes(edit(file.read_bytes()))
  change(folder, **fields)


def store(folder, name, value):
  """Another tensor in adapter.safetensors, without a checksum."""
  file = folder / "adapter.safetensors"
  save_file({**load_file(file), name: np.float32(value)}, file)
  change(folder, **{SHA256: None})


D = "encoder.layer.0-1.attention.self.query.vera_d"


@pytest.mark.parametrize(
  "harm, words",
  [
    (shutil.rmtree, "There is no adapter folder"),
    (lambda f: (f / "adapter.json").unlink(), "There is no .*adapter.json"),
    (
      lambda f: (f / "adapter.safetensors").unlink(),
      "There is no .*adapter.safetensors",
    ),
    (lambda f: (f / "adapter.json").write_text("{"), "read as JSON"),
    (lambda f: (f / "adapter.json").write_bytes(b"\xff"), "read as JSON"),
    (lambda f: (f / "adapter.json").write_text("[]"), "not a JSON object"),
    (
      lambda f: change(f, method=3, base_fingerprint=None),
      "no usable method, base_fingerprint",
    ),
    (
      lambda f: change(f, format=FORMAT + 1),
      f"has format {FORMAT + 1}; .* reads format {FORMAT}",
    ),
    (lambda f: change(f, format="new"), "has format 'new'"),
    (lambda f: damage(f, lambda data: data[:-9]), "checksum differs"),
    (
      lambda f: damage(f, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
      "checksum differs",
    ),
    (
      lambda f: damage(f, lambda data: data[:-9], **{SHA256: None}),
      "no whole safetensors file",
    ),
    (lambda f: store(f, D, [[0] * 8]), "vera_d has shape .* says 2 layers"),
    (
      lambda f: store(f, "classifier.bias", [np.nan, 0]),
      "classifier.bias holds values that are not finite",
    ),
    (
      lambda f: store(f, "classifier.bias", [3e38, 0]),
      "classifier.bias holds values .* or are beyond 1e\\+09",
    ),
    *(
      (lambda f, n=n: change(f, max_length=n), f"max_length is {n!r}; it must")
      for n in (0, 1, -5, "5", True, 7.5)
    ),
  ],
)
def test_damage_is_an_error(harm, words, random_adapter):
  folder = random_adapter()
  harm(folder)
  with pytest.raises(UserError, match=words):
    load_adapter(folder)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_part_of_an_adapter(there, tmp_path, monkeypatch):
  """What is in the way of the next try; an older one stays as it was."""
  folder, calls = tmp_path / "adapter", []
  if there:
    save_adapter(folder, make(True), about={**ABOUT, "score": 1})
  before = sorted(tmp_path.rglob("*"))

  def full(handle):
    calls.append(handle)
    if len(calls) > 1:  # the first file is written
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="adapter can't be written: No space"):
      save_adapter(folder, make(True), about={**ABOUT, "score": 2})
  assert sorted(tmp_path.rglob("*")) == before
  save_adapter(folder, make(True), about={**ABOUT, "score": 3})
  assert json.loads((folder / "adapter.json").read_text())["score"] == 3


def test_a_runs_folder_stands_for_its_adapter(random_adapter, tmp_path):
  shutil.copytree(random_adapter(), tmp_path / "run/adapter")
  assert load_adapter(tmp_path / "run").folder == tmp_path / "run/adapter"
