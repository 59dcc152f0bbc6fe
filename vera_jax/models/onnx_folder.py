"""A DINOv2 inside an ONNX file, as a folder in Hugging Face's layout.

Everything here that takes a model takes such a folder. So a file gets one, in
the cache and by its checksum: config.json, preprocessor_config.json and the
weights of the network that torch exported under the name `backbone`.

torch's export keeps the names of parameters but for the kernels of dense
layers, which it turns to (in, out) and numbers. They are found by the names of
the nodes that multiply with them, which are those of the modules; so are the
two parts of the position table.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vera_jax.errors import UserError
from vera_jax.files import cached_folder, sha256_of, write_json

SUFFIX = ".onnx"
WEIGHTS = "model.safetensors"
LAYOUT = 1  # counted up when the folder of the same file becomes another
PREFIX = "backbone."
HEAD_WIDTH = 64  # of every DINOv2; the weights alone don't tell it
# The nodes that read the position table: of the class token and of the patches.
POSITIONS = (
  re.compile(r"/backbone/embeddings/Concat(_\d+)?"),
  re.compile(r"/backbone/embeddings/Reshape(_\d+)?"),
)
# Resizing is a run's choice; the colours are those of DINOv2's own training.
PREPROCESSOR = {
  "image_processor_type": "BitImageProcessor",
  "do_resize": True,
  "size": {"height": 224, "width": 224},
  "resample": 3,
  "do_center_crop": False,
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
}


def onnx_folder(file: Path) -> Path:
  """The folder in Hugging Face's layout that holds an ONNX file's DINOv2.

  It is made once for each content, and found again in the time of a checksum.

  Raises:
    UserError: the file can't be read, or holds no such network.
  """
  file = file.expanduser().resolve()

  def fill(new: Path) -> None:
    tensors = read_dinov2(file)
    write_json(new / "config.json", config_fields(tensors))
    write_json(new / "preprocessor_config.json", PREPROCESSOR)
    save_file(tensors, new / WEIGHTS)

  return cached_folder("onnx", file, f"{LAYOUT}-{sha256_of(file)[:32]}", fill)


def read_dinov2(file: Path) -> dict[str, np.ndarray]:
  """An ONNX file's tensors under Hugging Face's names, without a prefix.

  Raises:
    UserError: it is no ONNX file, or lacks a tensor of a DINOv2.
  """
  try:
    import onnx
    from google.protobuf.message import DecodeError
  except ImportError as error:
    raise UserError(
      f"{file} needs the package onnx: pip install -r requirements-images.txt"
    ) from error
  try:
    graph = onnx.load(file).graph
    stored = {
      tensor.name: onnx.numpy_helper.to_array(tensor)
      for tensor in graph.initializer
    }
  except (DecodeError, OSError, ValueError, TypeError) as error:
    raise UserError(f"{file} is no whole ONNX file ({error}).") from error
  found = {
    name.removeprefix(PREFIX): value
    for name, value in stored.items()
    if name.startswith(PREFIX)
  }
  places: dict[int, np.ndarray] = {}
  for node in graph.node:
    known = [x for x in node.input if x in stored and not x.startswith(PREFIX)]
    if len(known) != 1:
      continue
    value = stored[known[0]]
    if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
      module = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
      found[f"{module.replace('/', '.')}.weight"] = value.T
    for part, pattern in enumerate(POSITIONS):
      if pattern.fullmatch(node.name) and value.ndim == 3:
        places[part] = value
  try:
    table = np.concatenate([places[0], places[1]], axis=1)
    found["embeddings.position_embeddings"] = table
    config_fields(found)
  except (KeyError, ValueError) as error:
    raise UserError(
      f"{file} holds no DINOv2 as torch exports it under the name backbone"
      f" ({error})."
    ) from error
  return {name: np.ascontiguousarray(x) for name, x in found.items()}


def config_fields(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """config.json's fields, which the shapes say.

  Raises:
    KeyError: a tensor is missing.
  """
  width, _, patch, _ = tensors[
    "embeddings.patch_embeddings.projection.weight"
  ].shape
  layers = {name.split(".")[2] for name in tensors if "encoder.layer" in name}
  inner = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
  table = tensors["embeddings.position_embeddings"]
  side = round((table.shape[1] - 1) ** 0.5)
  return {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": width,
    "num_hidden_layers": len(layers),
    "num_attention_heads": width // HEAD_WIDTH,
    "mlp_ratio": inner // width,
    "image_size": side * patch,
    "patch_size": patch,
    "layer_norm_eps": 1e-6,
  }
