"""The adapter's two files: names, shapes, values."""

import json

import numpy as np
from safetensors.numpy import load_file

from vera_jax.adapter_files import save_adapter, tensors


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
  assert about == {"targets": ["query"]}
  loaded = load_file(folder / "adapter.safetensors")
  for name, value in tensors(make(True)).items():
    np.testing.assert_array_equal(loaded[name], value)
