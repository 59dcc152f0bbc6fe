"""GGUF, llama.cpp's file of a whole model, read and written with numpy alone.

A file has, little-endian and in this order: the magic word, the version, the
numbers of tensors and of metadata entries; the entries, each a key, a type and
a value; of each tensor its name, dimensions (the innermost first), type and
offset; then, aligned, the tensors' bytes. Quantised tensors come in blocks of
32 weights along a row, with a scale each:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Files may come from strangers. So no number in one is believed before the bytes
that it speaks of were found to be inside the file.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vera_jax.errors import UserError
from vera_jax.files import TENSORS, check_file, write_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 differs by allowing big-endian files, which are refused
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
NAME = 63  # bytes of a tensor's name at most, as in llama.cpp
TEXT, ARRAY = 8, 9
# The struct letters of a value's other types, by their number in the file.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


class Format(NamedTuple):
  """How a tensor is stored: the file's number for it, and its blocks."""

  number: int
  weights: int
  size: int  # bytes of a block


FORMATS = {
  "F32": Format(0, 1, 4),
  "F16": Format(1, 1, 2),
  "BF16": Format(30, 1, 2),
  "Q4_0": Format(2, 32, 18),
  "Q4_1": Format(3, 32, 20),
  "Q8_0": Format(8, 32, 34),
}
PLAIN = {
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(jnp.bfloat16),
}
# What else files often hold, so that an error can name it.
UNREAD = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"} | {
  13: "Q5_K",
  14: "Q6_K",
  20: "IQ4_NL",
  23: "IQ4_XS",
}


class Tensor(NamedTuple):
  """Where a tensor is in its file; `shape` has the innermost axis last."""

  shape: tuple[int, ...]
  format: str
  start: int
  size: int


class Gguf(NamedTuple):
  """An open file; its tensors are read when they are asked for.

  Attributes:
    file: its path.
    metadata: by key; arrays of numbers are numpy's, those of texts are lists.
    tensors: by name.
    data: the file's bytes, mapped.
  """

  file: Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]
  data: np.ndarray

  def stored(self, name: str) -> UInt8[np.ndarray, " bytes"]:
    """A tensor's bytes as they are in the file."""
    tensor = self.tensors[name]
    return self.data[tensor.start : tensor.start + tensor.size]

  def values(self, name: str) -> Float[np.ndarray, "..."]:
    """A tensor's values: float32, or float16 and bfloat16 as stored."""
    tensor = self.tensors[name]
    return decode(self.stored(name), format=tensor.format, shape=tensor.shape)


class Blocks(NamedTuple):
  """A quantised tensor's codes; its values are scale · level (+ minimum).

  Attributes:
    codes: [..., 32] int8, which are the levels, or [..., 16] uint8: a byte has
      weight i in its low half and weight i + 16 in its high one.
    scale, minimum: [..., 1] float16; no minimum is 0.
    format: the levels of codes in four bits: "uint4" 0 to 15, "int4" -8 to 7;
      "int8" for the others.
  """

  codes: np.ndarray
  scale: np.ndarray
  minimum: np.ndarray | None
  format: str


class Written(NamedTuple):
  """A tensor to write; `values` is called when its turn has come."""

  format: str
  shape: tuple[int, ...]
  values: Callable[[], np.ndarray]


def read_gguf(file: str | Path) -> Gguf:
  """Open a file: its metadata, and where its tensors are.

  Raises:
    UserError: it can't be read, is damaged, or has what isn't read here
      (version 1, big-endian, one part of several, other quantisations).
  """
  file = Path(file)
  if file.exists():
    check_file(file, inside=None, limit=TENSORS)  # no pipe, no device
  try:
    data = np.memmap(file, np.uint8, mode="r")
  except (OSError, ValueError) as error:  # an empty file is a ValueError
    raise UserError(f"{file} can't be read: {error}.") from error
  header = _Header(file, memoryview(data.data))
  if bytes(data[:4]) != MAGIC:
    raise UserError(f"{file} is no GGUF file: it doesn't begin with GGUF.")
  header.position = 4
  version = header.number("I")
  if version not in VERSIONS:
    what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
    raise UserError(
      f"{file} is {what}; GGUF is read here in versions 2 and 3, little-endian."
      " Convert the model again with a present llama.cpp."
    )
  tensor_count, entries = header.number("Q"), header.number("Q")
  # the fewest bytes of each: lengths, types, offsets
  header.expect(tensor_count * 32 + entries * 13)
  metadata: dict[str, Any] = {}
  for _ in range(entries):
    key = header.text()
    if key in metadata:
      header.refuse(f"it has {key!r} twice")
    metadata[key] = header.value(header.number("I"))
  if isinstance(parts := metadata.get("split.count"), int) and parts > 1:
    raise UserError(
      f"{file} is one of {parts} parts; join them first: llama-gguf-split"
      " --merge FIRST_PART OUT.gguf"
    )
  found: dict[str, tuple[tuple[int, ...], int, int]] = {}
  for _ in range(tensor_count):
    name = header.text()
    axes = header.number("I")
    if not 1 <= axes <= 4 or name in found or len(name.encode()) > NAME:
      header.refuse(
        f"its tensor {name[:NAME]!r} has {axes} axes, is there twice, or has a"
        f" name of more than {NAME} bytes"
      )
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    found[name] = shape, header.number("I"), header.number("Q")
  step = metadata.get("general.alignment", ALIGNMENT)
  if not isinstance(step, int) or step < 1 or step & (step - 1):
    header.refuse(f"its alignment is {step!r}")
  # The tensors lie one behind the other, as llama.cpp expects it: so all that
  # is read together is no more than the file, whatever its header says.
  first = end = -(-header.position // step) * step
  formats = {format.number: name for name, format in FORMATS.items()}
  tensors = {}
  for name, (shape, number, offset) in found.items():
    if number not in formats:
      raise UserError(
        f"{file}: the tensor {name!r} is stored as"
        f" {UNREAD.get(number, f'type {number}')}; here"
        f" {', '.join(FORMATS)} are read. Take the model in one of these, such"
        " as its Q8_0 file."
      )
    format = FORMATS[formats[number]]
    count, start = math.prod(shape), first + offset
    size = count // format.weights * format.size
    if not count or shape[-1] % format.weights or offset % step:
      header.refuse(f"its tensor {name!r} has the shape {shape} at {offset}")
    if start + size > len(data):
      header.refuse(f"its tensor {name!r} lies beyond the file's end")
    if start != end:
      header.refuse(f"its tensor {name!r} is not behind the one before it")
    tensors[name] = Tensor(shape, formats[number], start, size)
    end += -(-size // step) * step
  return Gguf(file, metadata, tensors, data)


def decode(
  stored: UInt8[np.ndarray, " bytes"], *, format: str, shape: Sequence[int]
) -> Float[np.ndarray, "..."]:
  """A tensor's values from its bytes, exactly: scale · code (+ minimum).

  A scale and a minimum are float16, the products float32.

  Args:
    stored: whole blocks, row after row.
    format: a name in `FORMATS`.
    shape: of the result; blocks lie along its last axis.
  """
  if format in PLAIN:
    return stored.view(PLAIN[format]).reshape(shape)
  codes, scale, minimum, levels = take_apart(stored, format=format)
  if levels != "int8":
    codes = np.concatenate([codes & 15, codes >> 4], axis=1)
  values = codes.astype(np.float32)
  if levels == "int4":
    values -= 8
  values *= scale.astype(np.float32)
  if minimum is not None:
    values += minimum.astype(np.float32)
  return values.reshape(shape)


def take_apart(stored: UInt8[np.ndarray, " bytes"], *, format: str) -> Blocks:
  """The blocks of a quantised tensor: views into its bytes."""
  blocks = stored.reshape(-1, FORMATS[format].size)
  scale = blocks[:, :2].view("<f2")
  if format == "Q8_0":
    return Blocks(blocks[:, 2:].view(np.int8), scale, None, "int8")
  if format == "Q4_0":
    return Blocks(blocks[:, 2:], scale, None, "int4")
  return Blocks(blocks[:, 4:], scale, blocks[:, 2:4].view("<f2"), "uint4")


def encode(values: Float[np.ndarray, "..."], *, format: str) -> bytes:
  """The bytes of a tensor: F32, F16, BF16, or Q8_0 as llama.cpp rounds it.

  Raises:
    UserError: a value that the format can't hold.
  """
  if format in PLAIN:
    with np.errstate(over="ignore"):
      plain = values.astype(PLAIN[format])
    if not np.isfinite(plain).all():
      raise UserError(f"{format} can't hold all its values; choose another.")
    return plain.tobytes()
  if format != "Q8_0":
    raise ValueError(f"{format} is not written here")
  blocks = values.astype(np.float32).reshape(-1, FORMATS[format].weights)
  scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
  with np.errstate(divide="ignore", over="ignore"):
    # where 1/scale is infinite the scale itself is 0 as float16
    inverse = np.where(scale > np.finfo(np.float32).tiny, 1 / scale, 0)
    short = scale.astype("<f2")
  if not np.isfinite(short).all():
    raise UserError(f"{format} can't hold all its values; choose another.")
  exact = np.abs(blocks * inverse)
  whole = np.floor(exact)
  whole += exact - whole >= 0.5  # halves away from zero, as C's roundf
  codes = np.copysign(whole, blocks).astype(np.int8)
  both = np.concatenate([short.view(np.uint8), codes.view(np.uint8)], axis=1)
  return both.tobytes()


def write_gguf(
  file: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Written]
) -> None:
  """Write a file of version 3, whole or not at all.

  Args:
    file: its path.
    metadata: texts, truth values, whole numbers (uint32), floats (float32),
      lists of texts, and numpy arrays of int32 or float32.
    tensors: one is in memory at a time.

  Raises:
    UserError: a tensor with values that its format can't hold.
  """

  def write(out: BinaryIO) -> None:
    out.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
      out.write(_text(key) + _value(value))
    offset = 0
    for name, tensor in tensors.items():
      format = FORMATS[tensor.format]
      out.write(_text(name) + struct.pack("<I", len(tensor.shape)))
      out.write(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
      out.write(struct.pack("<IQ", format.number, offset))
      size = math.prod(tensor.shape) // format.weights * format.size
      offset += -(-size // ALIGNMENT) * ALIGNMENT
    for name, tensor in tensors.items():
      out.write(bytes(-out.tell() % ALIGNMENT))
      try:
        out.write(encode(tensor.values(), format=tensor.format))
      except UserError as error:
        raise UserError(f"The tensor {name}: {error}") from error
    out.write(bytes(-out.tell() % ALIGNMENT))

  write_file(Path(file), write)


class _Header:
  """Reads one value after the other, never beyond the file's end."""

  def __init__(self, file: Path, data: memoryview) -> None:
    self.file, self.data, self.position = file, data, 0

  def refuse(self, reason: str) -> NoReturn:
    raise UserError(
      f"{self.file} is no whole GGUF file: {reason}. Fetch or copy it again."
    )

  def expect(self, size: int) -> None:
    """Refuses the file if fewer bytes are left."""
    if size > len(self.data) - self.position:
      self.refuse(f"it ends within its header, at byte {len(self.data)}")

  def bytes(self, size: int) -> memoryview:
    self.expect(size)
    start, self.position = self.position, self.position + size
    return self.data[start : self.position]

  def number(self, letter: str) -> Any:
    size = struct.calcsize(f"<{letter}")
    return struct.unpack(f"<{letter}", self.bytes(size))[0]

  def text(self) -> str:
    try:
      return str(self.bytes(self.number("Q")), "utf-8")
    except UnicodeDecodeError:
      self.refuse(f"before byte {self.position} a text is not UTF-8")

  def value(self, kind: int) -> Any:
    if kind == TEXT:
      return self.text()
    if kind in SCALARS:
      return self.number(SCALARS[kind])
    if kind != ARRAY:
      self.refuse(f"before byte {self.position} a value has type {kind}")
    inner, count = self.number("I"), self.number("Q")
    if inner == TEXT:
      self.expect(count * 8)  # the texts' lengths
      return [self.text() for _ in range(count)]
    if inner not in SCALARS:  # arrays of arrays are allowed, and unused
      self.refuse(f"before byte {self.position} an array has type {inner}")
    dtype = np.dtype(f"<{SCALARS[inner]}")
    return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).copy()


def _text(value: str) -> bytes:
  encoded = value.encode("utf-8")
  return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
  """A value with its type before it."""
  kinds = {letter: kind for kind, letter in SCALARS.items()}
  if isinstance(value, str):
    return struct.pack("<I", TEXT) + _text(value)
  if isinstance(value, list):
    head = struct.pack("<IIQ", ARRAY, TEXT, len(value))
    return head + b"".join(map(_text, value))
  if isinstance(value, np.ndarray):
    kind = kinds[{"int32": "i", "float32": "f"}[value.dtype.name]]
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
  letter = {bool: "?", int: "I", float: "f"}[type(value)]
  return struct.pack(f"<I{letter}", kinds[letter], value)
