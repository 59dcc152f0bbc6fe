"""A safetensors file of which slices are read, in blocks.

The safetensors library maps a file into memory, where what was read of it stays
as long as the file is open, and columns bring all of it in. Here the bytes that
are asked for are read and nothing is mapped: a process needs memory for what it
keeps and for one block.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vera_jax.errors import UserError
from vera_jax.files import JSON, TENSORS, open_file, parse_json

# The types that are read, by their names in a header.
FLOATS = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(jnp.bfloat16),
}
BLOCK = 4 * 2**20  # bytes that are read at once
PAGE = 4096  # bytes; storage reads no less, so a shorter gap is read as well
Index = Sequence[slice]


class Slices:
  """One tensor, which is read as it is indexed."""

  def __init__(
    self,
    file: "SafetensorsFile",
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    start: int,
  ) -> None:
    self._file, self._name, self._start = file, name, start
    self._dtype, self._shape = dtype, shape

  def get_shape(self) -> tuple[int, ...]:
    return self._shape

  def get_dtype(self) -> str:
    return self._dtype

  def __getitem__(self, index: Index) -> Float[np.ndarray, "..."]:
    """The numbers of a slice, one `slice` without steps for each axis."""
    shape = self._shape
    check_type(self._name, self._dtype)
    (first, last), *_ = bounds(index, shape)
    left, width, row = self._row(index)
    start = self._start + first * row
    if row - width < PAGE:  # whole rows, of which columns are taken
      data = np.empty((last - first) * row, np.uint8)
      self._file.read_into(data, start)
      values = data.view(FLOATS[self._dtype])
      return values.reshape(last - first, *shape[1:])[:, *index[1:]]
    data = np.empty((last - first, width), np.uint8)
    for number in range(last - first):
      self._file.read_into(data[number], start + number * row + left)
    values = data.view(FLOATS[self._dtype])
    columns = slice(*bounds(index, shape)[1])
    shape = last - first, columns.stop - columns.start, *shape[2:]
    return values.reshape(shape)[:, :, *index[2:]]

  def blocks(
    self, index: Index, *, axis: int = 0
  ) -> Iterator[tuple[slice, Float[np.ndarray, "..."]]]:
    """A slice in blocks along an axis: where each lies in it, and its numbers.

    A block has at most `BLOCK` bytes, or a single row.
    """
    first, last = bounds(index, self._shape)[axis]
    low, high = bounds(index, self._shape)[0]
    _, width, row = self._row(index)
    size = (high - low) * (row if row - width < PAGE else width)
    step = max(1, (last - first) * BLOCK // max(1, size))
    for start in range(first, last, step):
      stop = min(start + step, last)
      part = (*index[:axis], slice(start, stop), *index[axis + 1 :])
      yield slice(start - first, stop - first), self[part]

  def _row(self, index: Index) -> tuple[int, int, int]:
    """Of each row: the first byte that is asked for, how many are, and all."""
    shape = self._shape
    unit = math.prod(shape[2:]) * FLOATS[self._dtype].itemsize
    if len(shape) < 2:
      return 0, unit, unit
    low, high = bounds(index, shape)[1]
    return low * unit, (high - low) * unit, shape[1] * unit


class SafetensorsFile:
  """An open file; it answers as the library's `safe_open` does.

  Raises:
    UserError: it is missing, damaged, or no such file.
  """

  def __init__(self, file: Path) -> None:
    self.name = file
    self._opened = open_file(file, inside=None, limit=TENSORS).detach()
    try:
      self._tensors = self._read_header()
    except (KeyError, OSError, TypeError, ValueError) as error:
      self._opened.close()
      raise UserError(
        f"{file} is no whole safetensors file ({error}); fetch or copy it"
        " again."
      ) from error

  def __enter__(self) -> "SafetensorsFile":
    return self

  def __exit__(self, *_: object) -> None:
    self._opened.close()

  def keys(self) -> list[str]:
    return list(self._tensors)

  def get_slice(self, name: str) -> Slices:
    return self._tensors[name]

  def get_tensor(self, name: str) -> Float[np.ndarray, "..."]:
    tensor = self._tensors[name]
    return tensor[(slice(None),) * len(tensor.get_shape())]

  def read_into(self, out: np.ndarray, start: int) -> None:
    """Fills an array of bytes with those of the file from one on."""
    view = out.data
    self._opened.seek(start)
    while view:
      count = self._opened.readinto(view)
      if not count:
        raise UserError(
          f"{self.name} became shorter while it was read; fetch or copy it"
          " again."
        )
      view = view[count:]

  def _read_header(self) -> dict[str, Slices]:
    """The tensors by name: https://github.com/huggingface/safetensors#format.

    Raises:
      KeyError, TypeError, ValueError: it is none, or not of this file.
    """
    size = os.fstat(self._opened.fileno()).st_size
    length = int.from_bytes(self._opened.read(8), "little")
    start = 8 + length
    if size < 8 or start > size or length > JSON:
      raise ValueError(f"its header would have {length:,} bytes")
    entries = parse_json(self._opened.read(length))
    if not isinstance(entries, dict):
      raise ValueError("its header is no object")
    entries.pop("__metadata__", None)
    tensors, stop = {}, start
    for name, entry in entries.items():
      dtype, shape = entry["dtype"], entry["shape"]
      begin, end = entry["data_offsets"]
      numbers = [begin, end, *shape]
      if not all(type(x) is int and 0 <= x < 2**63 for x in numbers):
        raise ValueError(f"the entry of {name!r} in its header has {numbers}")
      known = FLOATS.get(dtype)  # others are refused where they are needed
      if known and end - begin != math.prod(shape) * known.itemsize:
        raise ValueError(f"{name!r} has {end - begin:,} bytes, but is {shape}")
      tensors[name] = Slices(self, name, dtype, tuple(shape), start + begin)
      stop = max(stop, start + end)
    if stop != size:
      raise ValueError(f"it has {size:,} bytes, and {stop:,} by its header")
    return tensors


def check_type(name: str, dtype: str) -> None:
  """Raises a UserError for a tensor of numbers that are not read."""
  if dtype not in FLOATS:
    raise UserError(
      f"Tensor {name!r} is stored as {dtype}; only {', '.join(FLOATS)} can be"
      " read. Use an unquantised checkpoint."
    )


def bounds(index: Index, shape: Sequence[int]) -> list[tuple[int, int]]:
  """The first number and the one after the last, of each axis."""
  return [
    part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
  ]
