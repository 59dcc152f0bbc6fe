"""The codes of a GGUF file's quantised tensors, as `Quantised` kernels.

A file has them in blocks of 32 weights with a scale, or (k-quants) of 256 in 16
or 8 smaller blocks, whose scales are whole numbers and share a unit:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
The packed codes are kept as they lie in the file; a k-quant's scales, of four
or six bits, get a byte each.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf import quants
from jax.typing import DTypeLike
from jaxtyping import UInt8

from vera_jax.operations.quantised import (
  INT8,
  LAYOUTS,
  Packed,
  Quantised,
  unpack,
)

_CODES = ("codes", "u1", (16,))
_SCALE, _MINIMUM = ("scale", "<f2", (1,)), ("minimum", "<f2", (1,))
_UNITS = ("scale_unit", "<f2", (1,)), ("minimum_unit", "<f2", (1,))
_PACKED = ("packed", "u1", (12,))  # scales, and perhaps minima, of six bits
# The parts of a block, by the format's name, in the file's order.
BLOCKS = {
  name: np.dtype(list(parts))
  for name, parts in {
    "Q4_0": (_SCALE, _CODES),
    "Q4_1": (_SCALE, _MINIMUM, _CODES),
    "Q5_0": (_SCALE, ("high", "u1", (4,)), _CODES),
    "Q5_1": (_SCALE, _MINIMUM, ("high", "u1", (4,)), _CODES),
    "Q8_0": (_SCALE, ("codes", "i1", (32,))),
    "Q2_K": (("packed", "u1", (16,)), ("codes", "u1", (64,)), *_UNITS),
    "Q3_K": (
      *(("high", "u1", (32,)), ("codes", "u1", (64,))),
      *(_PACKED, _UNITS[0]),
    ),
    "Q4_K": (*_UNITS, _PACKED, ("codes", "u1", (128,))),
    "Q5_K": (*_UNITS, _PACKED, ("high", "u1", (32,)), ("codes", "u1", (128,))),
    "Q6_K": (
      *(("codes", "u1", (128,)), ("high", "u1", (64,))),
      *(("scale", "i1", (16,)), _UNITS[0]),
    ),
  }.items()
}


class Blocks(NamedTuple):
  """A tensor's blocks.

  Attributes:
    parts: those of a `Quantised` that the format has, by name, each as
      [..., numbers of a block]; views into the file where they can be.
    format: as in `Quantised`.
  """

  parts: Mapping[str, np.ndarray]
  format: str

  def with_parts(self, change: Callable[[np.ndarray], np.ndarray]) -> "Blocks":
    """The blocks with each part changed."""
    parts = {name: change(part) for name, part in self.parts.items()}
    return Blocks(parts, self.format)


def take_apart(
  stored: UInt8[np.ndarray, " bytes"], *, format: str
) -> Blocks | None:
  """The blocks of a GGUF file's tensor; None where the format isn't kept."""
  if format not in BLOCKS:
    return None
  blocks = stored.view(BLOCKS[format])
  parts = {name: blocks[name] for name in BLOCKS[format].names or ()}
  if (packed := parts.pop("packed", None)) is not None:
    parts |= _scales(packed, format)
  if "minimum_unit" in parts:  # the file has what is subtracted
    parts["minimum_unit"] = -parts["minimum_unit"]
  return Blocks(parts, INT8 if format == "Q8_0" else format)


def _scales(packed: np.ndarray, format: str) -> dict[str, np.ndarray]:
  """A k-quant's scales, and minima where it has them, as whole numbers."""
  if format == "Q2_K":
    scale, minimum = packed & 15, packed >> 4
  elif format == "Q3_K":  # 16 times four bits, and then the two above these
    low = unpack(packed[:, :8, None], Packed(4, 8))
    high = unpack(packed[:, 8:, None], Packed(2, 4))
    return {"scale": (low | high << 4)[..., 0].astype(np.int8) - np.int8(32)}
  else:
    scale, minimum = quants.Q4_K.get_scale_min(packed)
  return {"scale": scale.view(np.int8), "minimum": minimum.view(np.int8)}


def keep(
  blocks: Blocks | None,
  *,
  dtype: DTypeLike = jnp.float32,
  table: bool = False,
) -> Quantised | None:
  """The codes of a matrix of a GGUF file, which has outputs before inputs.

  Args:
    blocks: of `gguf_folder.Tensors.get_codes`, each part [outputs, blocks, n];
      None, and the result too, where the file's format isn't kept.
    dtype: as in `Quantised`.
    table: whether it is one of words, see `coded_table.py`.
  """
  if blocks is None:
    return None
  outputs, count, codes = blocks.parts["codes"].shape
  # as many weights as bytes, or as their low bits make
  packed = 1 if blocks.format == INT8 else 8 // LAYOUTS[blocks.format].low.bits
  inputs = count * codes * packed
  turned = {}
  for name, part in blocks.parts.items():
    rows = part.reshape(outputs, -1)
    turned[name] = np.ascontiguousarray(rows[..., None] if table else rows.T)
  return Quantised(
    **{"minimum": None, **turned},
    format=blocks.format,
    axes=(inputs,) if table else (inputs, outputs),
    dtype=jnp.dtype(dtype),
  )
