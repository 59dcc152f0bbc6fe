"""A known torch file as a folder in Hugging Face's layout.

Everything here that takes a model takes such a folder. So a file gets one, in
the cache and by its checksum. What a network is made of, and what images it was
trained on, isn't in such a file: those that are known are in `NETWORKS`, by
their checksum, and no other is read.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vera_jax.errors import UserError
from vera_jax.files import cached_folder, sha256_of, write_json
from vera_jax.models.torch_file import read_state

SUFFIX = ".pth"
WEIGHTS = "model.safetensors"
LAYOUT = 1  # counted up when the folder of the same file becomes another
# EfficientNet-Lite0: layers, kernel, stride, expansion and width of its stages.
STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
LITE0 = {
  "architectures": ["EfficientNetLiteModel"],
  "model_type": "efficientnet_lite",
  "stem_width": 32,
  "stages": [
    dict(
      zip(("layers", "kernel", "stride", "expand", "width"), stage, strict=True)
    )
    for stage in STAGES
  ],
  "last_width": 1280,
  "batch_norm_eps": 1e-3,
  "image_size": 224,
}
# The package doesn't say how images were prepared. Of the usual ways, bytes x
# as (x - 127) / 128 answer best: docs/architectures.md has the comparison.
PREPROCESSOR = {
  "image_processor_type": "EfficientNetImageProcessor",
  "do_resize": True,
  "size": {"height": 224, "width": 224},
  "resample": 3,
  "do_center_crop": False,
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "image_mean": [127 / 255] * 3,
  "image_std": [128 / 255] * 3,
}
# By sha256 of the file: config.json and preprocessor_config.json.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": (
    LITE0,
    PREPROCESSOR,
  ),
}
# A module's name in the file -> in the tree.
MODULES = (
  (r"_conv_stem", "stem"),
  (r"_bn0", "stem_norm"),
  (r"_conv_head", "last"),
  (r"_bn1", "last_norm"),
  (r"_blocks\.(\d+)\._(expand|depthwise|project)_conv", r"encoder.layer.\1.\2"),
  (r"_blocks\.(\d+)\._bn0", r"encoder.layer.\1.expand_norm"),
  (r"_blocks\.(\d+)\._bn1", r"encoder.layer.\1.depthwise_norm"),
  (r"_blocks\.(\d+)\._bn2", r"encoder.layer.\1.project_norm"),
)
UNUSED = ("_fc.", "num_batches_tracked")  # ImageNet's classes, and a counter


def torch_folder(file: Path) -> Path:
  """The folder in Hugging Face's layout that holds a torch file's network.

  It is made once, and found again in the time of a checksum.

  Raises:
    UserError: the file can't be read, or is not among `NETWORKS`.
  """
  file = file.expanduser().resolve()
  found = sha256_of(file)
  if found not in NETWORKS:
    raise UserError(
      f"{file} is no torch file that is known here (its sha256 is {found}). A"
      " torch file doesn't say what its network is made of, and may run code of"
      " its own: name a folder with config.json and model.safetensors."
    )

  def fill(new: Path) -> None:
    fields, preprocessor = NETWORKS[found]
    save_file(named_as_here(read_state(file)), new / WEIGHTS)
    write_json(new / "config.json", fields)
    write_json(new / "preprocessor_config.json", preprocessor)

  return cached_folder("torch", file, f"{LAYOUT}-{found[:32]}", fill)


def named_as_here(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of an EfficientNet-Lite's state dict under our names.

  Raises:
    UserError: one has a name that no such network has.
  """
  tensors = {}
  for name, value in state.items():
    if any(word in name for word in UNUSED):
      continue
    module, _, leaf = name.rpartition(".")
    for pattern, here in MODULES:
      if match := re.fullmatch(pattern, module):
        tensors[f"{match.expand(here)}.{leaf}"] = value
        break
    else:
      raise UserError(f"An EfficientNet-Lite has no tensor {name!r}.")
  return tensors
