"""GGUF, llama.cpp's file of a whole model, read and written.

A file has, little-endian and in this order: the magic word, the version, the
numbers of tensors and of metadata entries; the entries, each a key, a type and
a value; of each tensor its name, dimensions (the innermost first), type and
offset; then, aligned, the tensors' bytes. Quantised tensors come in blocks of
32 or 256 weights along a row:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Files may come from strangers. So no number in one is believed before the bytes
that it speaks of were found to be inside the file; llama.cpp's own package
`gguf`, whose reader believes them, turns blocks into values and back.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from jaxtyping import Float, UInt8

from vera_jax.errors import UserError
from vera_jax.files import TENSORS, check_file, write_file
from vera_jax.places import place

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 differs by allowing big-endian files, which are refused
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
NAME = 63  # bytes of a tensor's name at most, as in llama.cpp
TEXT, ARRAY = 8, 9
# How llama-gguf-split names the parts of a model: which one, and of how many.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# The struct letters of a value's other types, by their number in the file.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


PLAIN = {
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(jnp.bfloat16),
}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K") + (
  *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
FORMATS = (*PLAIN, *QUANTISED)  # that are read
NUMBERS = {kind.value: kind.name for kind in GGMLQuantizationType}
# The largest number of each format that is written: of Q8_0 127 steps of the
# largest scale, which is a float16.
LARGEST = {
  "F32": float(np.finfo(np.float32).max),
  "F16": 65504.0,
  "BF16": float(jnp.finfo(jnp.bfloat16).max),
  "Q8_0": 127 * 65504.0,
}


class Tensor(NamedTuple):
  """Where a tensor is in its file, or in which part of it; `shape` has the
  innermost axis last."""

  shape: tuple[int, ...]
  format: str
  start: int
  size: int
  part: int = 0


class Gguf(NamedTuple):
  """An open file; its tensors are read when they are asked for.

  Attributes:
    file: its path, of a model in parts that of the first.
    metadata: by key; arrays of numbers are numpy's, those of texts are lists.
    tensors: by name.
    data: the bytes of each part, mapped.
  """

  file: Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]
  data: tuple[np.ndarray, ...]

  def stored(self, name: str) -> UInt8[np.ndarray, " bytes"]:
    """A tensor's bytes as they are in the file."""
    tensor = self.tensors[name]
    data = self.data[tensor.part]
    return data[tensor.start : tensor.start + tensor.size]

  def values(self, name: str) -> Float[np.ndarray, "..."]:
    """A tensor's values: float32, or float16 and bfloat16 as stored."""
    tensor = self.tensors[name]
    return decode(self.stored(name), format=tensor.format, shape=tensor.shape)


class Written(NamedTuple):
  """A tensor to write; `values` is called when its turn has come."""

  format: str
  shape: tuple[int, ...]
  values: Callable[[], np.ndarray]


def files_of(file: Path) -> list[Path]:
  """A model's files: this one, or all parts if it is named as the first one.

  Of a link the first name counts that is a part's.

  Raises:
    UserError: it is another part, or one is missing.
  """
  named = file
  for _ in range(8):  # links may lead in a circle
    part = PART.fullmatch(named.name)
    if part or not named.is_symlink():
      break
    named = named.parent / os.readlink(named)
  if not part or int(part[3]) < 2:
    return [file]
  parts = [
    named.with_name(f"{part[1]}-{number:05}-of-{part[3]}.gguf")
    for number in range(1, int(part[3]) + 1)
  ]
  if part[2] != "00001":
    raise UserError(
      f"{file} is not the first part of its model: name {parts[0].name}, which"
      " has the header."
    )
  if absent := [x.name for x in parts if not x.exists()]:
    raise UserError(
      f"{file} is one of {len(parts)} parts, and beside it lack"
      f" {', '.join(absent[:3])}{', ...' if absent[3:] else ''}. Fetch them"
      " too."
    )
  return parts


def read_gguf(file: str | Path) -> Gguf:
  """Open a model: its metadata, and where its tensors are.

  Args:
    file: its file, or the first of its parts.

  Raises:
    UserError: it can't be read, is damaged or not whole, or has what isn't read
      here (version 1, big-endian, other quantisations).
  """
  file = Path(file)
  files = files_of(file)
  model, *others = (_read_part(part) for part in files)
  tensors: dict[str, Tensor] = {}
  data: list[np.ndarray] = []
  for number, part in enumerate([model, *others]):
    stated = _split(part, "no"), _split(part, "count")
    if stated != (number, len(files)) and (others or stated[1] > 1):
      raise UserError(
        f"{part.file} says that it is part {stated[0]} (of 0, 1, ...) of"
        f" {stated[1]}, which its name does not: parts are found by names such"
        " as NAME-00001-of-00003.gguf. Give them these again."
      )
    if twice := tensors.keys() & part.tensors.keys():
      raise UserError(f"{part.file} has {min(twice)!r}, as another part does.")
    for name, tensor in part.tensors.items():
      tensors[name] = tensor._replace(part=number)
    data += part.data
  if others and (count := _split(model, "tensors.count")) != len(tensors):
    raise UserError(
      f"{file} and its other parts have {len(tensors)} tensors, not the {count}"
      " of the header. Fetch them again."
    )
  return Gguf(file, model.metadata, tensors, tuple(data))


def _split(part: Gguf, key: str) -> int:
  """A number of the header about the parts; -1 for what is none."""
  value = part.metadata.get(f"split.{key}", 0)
  return value if isinstance(value, int) else -1


def _read_part(file: Path) -> Gguf:
  """Open one file, which has a whole model or a part of it."""
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
  described: dict[str, tuple[tuple[int, ...], int, int]] = {}
  for _ in range(tensor_count):
    name = header.text()
    axes = header.number("I")
    if not 1 <= axes <= 4 or name in described or len(name.encode()) > NAME:
      header.refuse(
        f"its tensor {name[:NAME]!r} has {axes} axes, is there twice, or has a"
        f" name of more than {NAME} bytes"
      )
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    described[name] = shape, header.number("I"), header.number("Q")
  step = metadata.get("general.alignment", ALIGNMENT)
  if not isinstance(step, int) or step < 1 or step & (step - 1):
    header.refuse(f"its alignment is {step!r}")
  # The tensors lie one behind the other, as llama.cpp expects it: so all that
  # is read together is no more than the file, whatever its header says.
  first = end = -(-header.position // step) * step
  tensors = {}
  for name, (shape, number, offset) in described.items():
    format = NUMBERS.get(number, f"type {number}")
    if format not in FORMATS:
      raise UserError(
        f"{file}: the tensor {name!r} is stored as {format}; here"
        f" {', '.join(FORMATS)} are read. Take the model in one of these, such"
        " as its Q8_0 file."
      )
    weights, block_size = block_of(format)
    count, start = math.prod(shape), first + offset
    size = count // weights * block_size
    if not count or shape[-1] % weights or offset % step:
      header.refuse(f"its tensor {name!r} has the shape {shape} at {offset}")
    if start + size > len(data):
      header.refuse(f"its tensor {name!r} lies beyond the file's end")
    if start != end:
      header.refuse(f"its tensor {name!r} is not behind the one before it")
    tensors[name] = Tensor(shape, format, start, size)
    end += -(-size // step) * step
  return Gguf(file, metadata, tensors, (data,))


def block_of(format: str) -> tuple[int, int]:
  """How many weights a block of a format holds, and in how many bytes."""
  return GGML_QUANT_SIZES[GGMLQuantizationType[format]]


def decode(
  stored: UInt8[np.ndarray, " bytes"], *, format: str, shape: Sequence[int]
) -> Float[np.ndarray, "..."]:
  """A tensor's values from its bytes, exactly as llama.cpp has them.

  Args:
    stored: whole blocks, row after row.
    format: a name in `FORMATS`.
    shape: of the result; blocks lie along its last axis.
  """
  if format in PLAIN:
    return stored.view(PLAIN[format]).reshape(shape)
  rows = stored.reshape(math.prod(shape[:-1]), -1)
  return dequantize(rows, GGMLQuantizationType[format]).reshape(shape)


def encode(values: Float[np.ndarray, "..."], *, format: str) -> bytes:
  """The bytes of a tensor, in a format of `LARGEST`.

  Raises:
    UserError: a value that the format can't hold.
  """
  size = np.abs(values.astype(np.float32))
  if not (size <= LARGEST[format]).all():
    raise UserError(f"{format} can't hold all its values; choose another.")
  if format in PLAIN:
    return values.astype(PLAIN[format]).tobytes()
  # numbers so small make 0 in any case, and gguf would divide by their scale
  values = np.where(size < 1e-30, 0, values.astype(np.float32))
  return quantize(values, GGMLQuantizationType[format]).tobytes()


def refuse_there(file: Path) -> None:
  """Raises a UserError if a file is there."""
  if file.exists():
    raise UserError(f"{file} is there already; choose another --out.")


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
      weights, block_size = block_of(tensor.format)
      out.write(_text(name) + struct.pack("<I", len(tensor.shape)))
      out.write(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
      out.write(struct.pack("<IQ", GGMLQuantizationType[tensor.format], offset))
      size = math.prod(tensor.shape) // weights * block_size
      offset += -(-size // ALIGNMENT) * ALIGNMENT
    for name, tensor in tensors.items():
      out.write(bytes(-out.tell() % ALIGNMENT))
      try:
        out.write(encode(tensor.values(), format=tensor.format))
      except UserError as error:
        raise UserError(f"The tensor {name}: {error}") from error
    out.write(bytes(-out.tell() % ALIGNMENT))

  write_file(place(file), write)


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
