"""The tensors in a file as torch wrote them before 1.6, without torch.

Such a file is a row of pickles, which say what there is, and then the numbers:

  a magic number, the format's version, facts about the machine
  the state dict, whose tensors name a storage, an offset and a shape
  the storages' names, and of each how many numbers it has, and the numbers

A pickle can call whatever it names, so a free reader runs a stranger's code.
This one knows the five names that a state dict of numbers needs, makes plain
tuples for them, and imports nothing.
"""

import pickle
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vera_jax.errors import UserError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


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

  def persistent_load(self, given: Any) -> Storage:
    kind, dtype, key, _, size, view = given
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
