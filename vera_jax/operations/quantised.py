"""Frozen kernels in fewer bits: a leaf of the tree in a kernel's place.

A weight is scale · level (+ minimum), with one scale for a block of weights
along the input:

  keep   a GGUF file's own codes: blocks of 32, as Q4_0, Q4_1 and Q8_0 have them
  int8   one scale for each output, level = round(weight / scale)
  nf4    blocks of 64, 16 levels at a normal distribution's quantiles (QLoRA,
         arXiv 2305.14314, appendix E; its scales are not quantised again here)
  bfloat16
         the nearest numbers of 16 bits, without scales

A kernel is dequantised where a layer multiplies with it (`adapters/layers.py`),
in float32 and then in the model's type: so it has the very numbers of a base
that was dequantised when it was loaded. Codes of four bits lie two to a byte,
for jax's own four-bit arrays take a byte each in numpy and files, and more
temporary memory in products.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from vera_jax.errors import UserError

CHOICES = ("none", "keep", "int8", "nf4", "bfloat16")
NONE, KEEP, INT8, NF4, HALF = CHOICES
BLOCK = 64  # weights that share a scale in nf4
GGUF_BLOCK = 32  # weights that share a scale in a GGUF file's codes
# Formats of a GGUF file whose codes can be kept: their levels, and the bytes
# of a block before the codes: a scale and perhaps a minimum.
KEPT = {"Q4_0": ("int4", 2), "Q4_1": ("uint4", 4), "Q8_0": ("int8", 2)}
# By QLoRA's appendix E; bitsandbytes has the same numbers.
NF4_LEVELS = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)


def _whole(codes: Array) -> Float[Array, "..."]:
  return codes.astype(jnp.float32)


def _nf4(codes: Array) -> Float[Array, "..."]:
  return jnp.asarray(NF4_LEVELS, jnp.float32)[codes]


# The level of a code, by the format's name.
LEVELS: dict[str, Callable[[Array], Array]] = {
  "int8": _whole,
  "uint4": _whole,
  "int4": lambda codes: _whole(codes) - 8,
  "nf4": _nf4,
}


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


def take_apart(
  stored: UInt8[np.ndarray, " bytes"], *, format: str
) -> Blocks | None:
  """The blocks of a GGUF file's tensor: views into its bytes.

  Returns:
    None where codes of the format can't be kept.
  """
  if format not in KEPT:
    return None
  levels, header = KEPT[format]
  wide = levels == "int8"
  blocks = stored.reshape(-1, header + GGUF_BLOCK // (1 if wide else 2))
  scale, codes = blocks[:, :2].view("<f2"), blocks[:, header:]
  minimum = blocks[:, 2:4].view("<f2") if header == 4 else None
  return Blocks(codes.view(np.int8) if wide else codes, scale, minimum, levels)


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A kernel's codes; it has the shape and type of the kernel that they make.

  Attributes:
    codes: int8 or bfloat16 (*stack, i, o), or uint8 (*stack, i / 2, o), where
      byte j of a block has weight j in its low half and, in its high half, the
      weight half a block further.
    scale: (*stack, blocks, o); blocks are equal parts of i. None for 1.
    minimum: as the scale, added to the products; None for 0.
    format: a name in `LEVELS`, or "bfloat16", whose codes are the weights.
    axes: the kernel's own shape, without the stack: (i, o), or more axes as
      `nn.DenseGeneral` has them.
    dtype: of the kernel, once dequantised.
  """

  codes: Any
  scale: Any
  minimum: Any
  format: str
  axes: tuple[int, ...]
  dtype: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return *self.codes.shape[:-2], *self.axes

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes of codes, scales and minima, as they are allocated."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
  Quantised,
  data_fields=["codes", "scale", "minimum"],
  meta_fields=["format", "axes", "dtype"],
)


def check_quantise(choice: str) -> None:
  """Raises a UserError for what is no choice of config.model.quantise."""
  if choice not in CHOICES:
    raise UserError(
      f"config.model.quantise is {choice!r}; choose {', '.join(CHOICES)}."
    )


def is_quantised(leaf: Any) -> bool:
  """Whether a leaf is a kernel in codes, ours or those of qwix."""
  return isinstance(leaf, Quantised) or is_qwix(leaf)


def is_qwix(leaf: Any) -> bool:
  """Whether a leaf is a `qwix.QArray`, which nnx models may have."""
  return type(leaf).__name__ == "QArray"


def dequantise(kernel: Any) -> Float[Array, "*stack i o"]:
  """The kernel's weights, its own axes as two: inputs and outputs; qwix's in
  the kernel's own shape."""
  if is_qwix(kernel):
    from qwix import dequantize

    return dequantize(kernel)
  if kernel.format == HALF:
    return jnp.asarray(kernel.codes).astype(kernel.dtype)
  *stack, blocks, outputs = kernel.scale.shape
  codes = jnp.asarray(kernel.codes).reshape(*stack, blocks, -1, outputs)
  if codes.dtype == jnp.uint8:
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
  along = (*stack, blocks, 1, outputs)
  scale = jnp.asarray(kernel.scale, jnp.float32).reshape(along)
  weights = LEVELS[kernel.format](codes) * scale
  if kernel.minimum is not None:
    weights += jnp.asarray(kernel.minimum, jnp.float32).reshape(along)
  return weights.reshape(*stack, -1, outputs).astype(kernel.dtype)


@jax.custom_vjp
def half_product(
  x: Float[Array, "*t i"], kernel: Float[Array, "i o"]
) -> Float[Array, "*t o"]:
  """x @ kernel of a frozen kernel in bfloat16, to which x is rounded too.

  Products are accumulated in x's dtype; the incoming gradient is rounded to
  bfloat16 as well.
  """
  return jnp.matmul(
    x.astype(kernel.dtype), kernel, preferred_element_type=x.dtype
  )


def _half_forward(x, kernel):
  return half_product(x, kernel), kernel


def _half_backward(kernel, g):
  return half_product(g, kernel.T), None


half_product.defvjp(_half_forward, _half_backward)


def plain(leaf: Any) -> Any:
  """A leaf as an array of its shape, dequantised if it is quantised."""
  if not is_quantised(leaf):
    return leaf
  return jax.jit(dequantise)(leaf).reshape(leaf.shape)


def quantise(
  kernel: Float[np.ndarray, "i o"],
  kind: str,
  *,
  axes: Sequence[int] | None = None,
  dtype: DTypeLike = jnp.float32,
) -> Quantised | None:
  """A kernel's nearest codes, on the host; None where it isn't whole blocks.

  Args:
    kernel: one layer's.
    kind: "int8", "nf4" or "bfloat16".
    axes, dtype: as in `Quantised`; None for the kernel's own two.

  Raises:
    UserError: it has values that are not finite numbers.
  """
  inputs, outputs = kernel.shape
  shape = tuple(axes or kernel.shape)
  if kind == HALF:
    codes = kernel.astype(jnp.bfloat16)
    return Quantised(codes, None, None, kind, shape, jnp.dtype(dtype))
  if kind == NF4 and inputs % BLOCK:
    return None
  length = BLOCK if kind == NF4 else inputs
  weights = kernel.astype(np.float32).reshape(-1, length, outputs)
  largest = np.abs(weights).max(axis=1)
  if not np.isfinite(largest).all():
    raise UserError("it has values that are not finite numbers.")
  # Half a step beyond 127 is still nearest to it: qwix scales so too.
  scale = largest / np.float32(127.5 if kind == INT8 else 1)
  scale[scale < np.sqrt(np.finfo(np.float32).tiny)] = 1
  weights = weights / scale[:, None]
  if kind == INT8:
    codes = np.clip(np.rint(weights), -127, 127).astype(np.int8)
  else:
    levels = np.array(NF4_LEVELS, np.float32)
    codes = np.zeros(weights.shape, np.uint8)
    for border in (levels[1:] + levels[:-1]) / 2:
      codes += weights > border
    low, high = np.split(codes, 2, axis=1)
    codes = low | high << 4
  return Quantised(
    codes.reshape(-1, outputs),
    scale,
    None,
    kind,
    shape,
    jnp.dtype(dtype),
  )


def abstract_kernel(
  kernel: jax.ShapeDtypeStruct, kind: str
) -> Quantised | jax.ShapeDtypeStruct:
  """What `quantise` makes of a kernel (*stack, i, o), as shapes.

  Raises:
    UserError: the codes would be a file's own, which shapes don't tell.
  """
  if kind == KEEP:
    raise UserError(
      f"Which codes a file has is not known from shapes alone: choose {NF4} or"
      f" {INT8} in place of {KEEP} (config.model.quantise)."
    )
  *stack, inputs, outputs = kernel.shape
  if kind == NF4 and inputs % BLOCK:
    return kernel
  rows, blocks, code = {
    NF4: (inputs // 2, inputs // BLOCK, jnp.uint8),
    INT8: (inputs, 1, jnp.int8),
    HALF: (inputs, 0, jnp.bfloat16),
  }[kind]
  scale = None
  if blocks:
    scale = jax.ShapeDtypeStruct((*stack, blocks, outputs), jnp.float32)
  return Quantised(
    jax.ShapeDtypeStruct((*stack, rows, outputs), code),
    scale,
    None,
    kind,
    (inputs, outputs),
    kernel.dtype,
  )


def keep(
  blocks: Blocks | None, *, dtype: DTypeLike = jnp.float32
) -> Quantised | None:
  """The codes of a matrix of a GGUF file, which has outputs before inputs.

  Args:
    blocks: of `gguf_folder.Tensors.get_codes`; None, and the result too, where
      the file has the values themselves.
    dtype: as in `Quantised`.
  """
  if blocks is None:
    return None

  def turned(part: np.ndarray | None) -> Any:
    """[outputs, blocks, n] as (blocks n, outputs)."""
    if part is None:
      return None
    return np.ascontiguousarray(part.reshape(len(part), -1).T)

  outputs, count, _ = blocks.codes.shape
  codes, scale, minimum = map(turned, blocks[:3])
  return Quantised(
    codes,
    scale,
    minimum,
    blocks.format,
    (count * GGUF_BLOCK, outputs),
    jnp.dtype(dtype),
  )


def stack_layers(layers: Sequence[Quantised]) -> Quantised:
  """Layers' kernels as one leaf with their axis in front.

  Layers of different formats become int8 with minima, which holds all of them
  exactly.
  """
  if len({layer.format for layer in layers}) > 1:
    some = any(layer.minimum is not None for layer in layers)
    layers = [_widen(layer, minimum=some) for layer in layers]
  return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def _widen(kernel: Quantised, *, minimum: bool) -> Quantised:
  """The same numbers with a byte for each code."""
  codes, (blocks, outputs) = kernel.codes, kernel.scale.shape
  if kernel.format != "int8":
    pairs = codes.reshape(blocks, -1, outputs)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=1)
    codes = codes.astype(np.int8) - np.int8(8 * (kernel.format == "int4"))
    codes = codes.reshape(-1, outputs)
  least = kernel.minimum
  if minimum and least is None:
    least = np.zeros_like(kernel.scale)
  return dataclasses.replace(kernel, codes=codes, minimum=least, format="int8")


def codes_digest(params: Mapping[str, Any]) -> str | None:
  """sha256 of all codes and scales of a tree; None where nothing is quantised.

  Layers count one by one, so that stacked ones give what looped ones do.
  """
  digests: dict[str, bytes] = {}
  for path, leaf in flatten_dict(dict(params)).items():
    if not is_quantised(leaf):
      continue
    name = "/".join(path)
    stacked = "layer" in path
    for i in range(len(leaf.codes) if stacked else 1):
      sha = hashlib.sha256(leaf.format.encode())
      for part in jax.tree.leaves(leaf):
        value = np.asarray(part[i] if stacked else part)
        sha.update(value.tobytes())
      layer = name.replace("/layer/", f"/layer_{i}/") if stacked else name
      digests[layer] = sha.digest()
  if not digests:
    return None
  total = hashlib.sha256()
  for name in sorted(digests):
    total.update(name.encode() + digests[name])
  return total.hexdigest()
