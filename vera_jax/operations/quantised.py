"""Frozen kernels in fewer bits: a leaf of the tree in a kernel's place.

A weight is scale · level (+ minimum), with one scale for a block of weights
along the input:

  keep   a GGUF file's own codes, in blocks of 16 or 32 (`gguf_codes.py`)
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
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.errors import UserError

CHOICES = ("none", "keep", "int8", "nf4", "bfloat16")
NONE, KEEP, INT8, NF4, HALF = CHOICES
BLOCK = 64  # weights that share a scale in nf4
# By QLoRA's appendix E; bitsandbytes has the same numbers.
NF4_LEVELS = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)


class Packed(NamedTuple):
  """Codes of fewer bits than a byte has.

  A byte has the codes of weights that are `stride` apart, the first of them in
  its lowest bits: of four bits and a stride of 16, byte j of 16 has the weights
  j and j + 16.
  """

  bits: int
  stride: int


class Layout(NamedTuple):
  """How the levels of a format are stored.

  Attributes:
    low: of each code the low bits, which are packed in `Quantised.codes`.
    high: the bits above these, in `Quantised.high`; None for none.
    offset: a level is its code less this.
  """

  low: Packed
  high: Packed | None = None
  offset: int = 0


# int8 has its levels as they are; Q8_0 of a GGUF file is that as well.
LAYOUTS = {
  "Q2_K": Layout(Packed(2, 32)),
  "Q3_K": Layout(Packed(2, 32), Packed(1, 32), offset=4),
  "Q4_0": Layout(Packed(4, 16), offset=8),
  "Q4_1": Layout(Packed(4, 16)),
  "Q4_K": Layout(Packed(4, 32)),
  "Q5_0": Layout(Packed(4, 16), Packed(1, 1), offset=16),
  "Q5_1": Layout(Packed(4, 16), Packed(1, 1)),
  "Q5_K": Layout(Packed(4, 32), Packed(1, 32)),
  "Q6_K": Layout(Packed(4, 64), Packed(2, 32), offset=32),
  NF4: Layout(Packed(4, BLOCK // 2)),
}


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A kernel's codes; it has the shape and type of the kernel that they make.

  Attributes:
    codes: int8 or bfloat16 (*stack, i, o), or packed as uint8, in fewer rows
      (`LAYOUTS`).
    scale: (*stack, blocks, o); blocks are equal parts of i. None for 1.
    minimum: as the scale, added to the products; None for 0.
    format: a name in `LAYOUTS`, "int8", or "bfloat16", whose codes are the
      weights.
    axes: the kernel's own shape, without the stack: (i, o), or more axes as
      `nn.DenseGeneral` has them.
    dtype: of the kernel, once dequantised.
    high: packed bits above those in `codes`, or None.
    scale_unit, minimum_unit: float16 (*stack, larger blocks, o), with which
      scales and minima are multiplied, which are whole numbers then; or None.
  """

  codes: Any
  scale: Any
  minimum: Any
  format: str
  axes: tuple[int, ...]
  dtype: Any
  high: Any = None
  scale_unit: Any = None
  minimum_unit: Any = None

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
    """Bytes of codes and scales, as they are allocated."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
  Quantised,
  data_fields=[
    *("codes", "scale", "minimum", "high", "scale_unit", "minimum_unit")
  ],
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
  kernel = jax.tree.map(jnp.asarray, kernel)
  *stack, blocks, outputs = kernel.scale.shape
  levels = levels_of(kernel)
  if kernel.format == NF4:
    levels = jnp.asarray(NF4_LEVELS, jnp.float32)[levels]
  levels = levels.astype(jnp.float32).reshape(*stack, blocks, -1, outputs)
  weights = levels * _steps(kernel.scale, kernel.scale_unit)[..., None, :]
  if kernel.minimum is not None:
    weights += _steps(kernel.minimum, kernel.minimum_unit)[..., None, :]
  return weights.reshape(*stack, -1, outputs).astype(kernel.dtype)


def levels_of(kernel: Quantised) -> Any:
  """A kernel's levels (*stack, i, o) as whole numbers of eight bits; of nf4
  their places in `NF4_LEVELS`. numpy's or JAX's, as the codes are."""
  if kernel.format == INT8:
    return kernel.codes
  low, high, offset = LAYOUTS[kernel.format]
  codes = unpack(kernel.codes, low)
  if high is not None:
    codes = codes | unpack(kernel.high, high) << low.bits
  return codes.astype(np.int8) - np.int8(offset)


def unpack(codes: Any, packed: Packed) -> Any:
  """Packed codes (*stack, bytes, o) as one in each byte (*stack, i, o)."""
  *stack, _, outputs = codes.shape
  groups = codes.reshape(*stack, -1, packed.stride, outputs)
  mask = 2**packed.bits - 1
  parts = [groups >> shift & mask for shift in range(0, 8, packed.bits)]
  join = jnp.concatenate if isinstance(codes, Array) else np.concatenate
  return join(parts, axis=-2).reshape(*stack, -1, outputs)


def pack(codes: np.ndarray, packed: Packed) -> np.ndarray:
  """The inverse of `unpack`, of one layer on the host."""
  shifts = np.arange(0, 8, packed.bits, dtype=np.uint8)[:, None, None]
  groups = codes.reshape(-1, len(shifts), packed.stride, codes.shape[-1])
  parts = np.bitwise_or.reduce(groups << shifts, axis=1)
  return parts.reshape(-1, codes.shape[-1])


def _steps(numbers: Any, unit: Any) -> Any:
  """Scales or minima in float32, times their units; see `Quantised`."""
  numbers = numbers.astype(np.float32)
  if unit is None:
    return numbers
  *stack, units, outputs = unit.shape
  wide = numbers.reshape(*stack, units, -1, outputs)
  wide = wide * unit.astype(np.float32)[..., None, :]
  return wide.reshape(numbers.shape)


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
  largest: Float[np.ndarray, "1 o"] | None = None,
) -> Quantised | None:
  """A kernel's nearest codes, on the host; None where it isn't whole blocks.

  Args:
    kernel: one layer's.
    kind: "int8", "nf4" or "bfloat16".
    axes, dtype: as in `Quantised`; None for the kernel's own two.
    largest: of each output's weights in absolute value, where the kernel has
      some of the inputs alone; for int8.

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
  if largest is None:
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
    codes = pack(codes, LAYOUTS[NF4].low)
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


def stack_layers(layers: Sequence[Quantised]) -> Quantised:
  """Layers' kernels as one leaf with their axis in front.

  Layers of different formats become Q6_K, with minima where one has them, which
  holds the numbers of all k-quants exactly, or else int8, which holds all.
  """
  if len({layer.format for layer in layers}) > 1:
    units = all(layer.scale_unit is not None for layer in layers)
    blocks = max(len(layer.scale) for layer in layers)
    some = any(layer.minimum is not None for layer in layers)
    layers = [
      _widen(layer, blocks=blocks, minimum=some, units=units)
      for layer in layers
    ]
  return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def _widen(
  kernel: Quantised, *, blocks: int, minimum: bool, units: bool
) -> Quantised:
  """The same numbers with more bits and scales; `units`: as a k-quant has."""

  def repeated(numbers: np.ndarray) -> np.ndarray:
    return np.repeat(numbers, blocks // len(numbers), axis=0)

  levels, scale, least = levels_of(kernel), kernel.scale, kernel.minimum
  scale_unit, least_unit = kernel.scale_unit, kernel.minimum_unit
  if minimum and least is None:
    least = np.zeros_like(scale)
    least_unit = None if scale_unit is None else np.zeros_like(scale_unit)
  if not units and scale_unit is not None:
    scale, scale_unit = _steps(scale, scale_unit), None
    least = None if least is None else _steps(least, least_unit)
    least_unit = None
  codes, high, format = levels, None, INT8
  if units:
    format = "Q6_K"
    low, above, offset = LAYOUTS[format]
    assert above is not None
    raised = (levels + np.int8(offset)).view(np.uint8)
    codes = pack(raised & 2**low.bits - 1, low)
    high = pack(raised >> low.bits, above)
  return dataclasses.replace(
    kernel,
    codes=codes,
    scale=repeated(scale),
    minimum=None if least is None else repeated(least),
    format=format,
    high=high,
    scale_unit=scale_unit,
    minimum_unit=least_unit,
  )


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
        sha.update(_on_host(part, i if stacked else None).tobytes())
      layer = name.replace("/layer/", f"/layer_{i}/") if stacked else name
      digests[layer] = sha.digest()
  if not digests:
    return None
  total = hashlib.sha256()
  for name in sorted(digests):
    total.update(name.encode() + digests[name])
  return total.hexdigest()


def _on_host(part: Any, layer: int | None) -> np.ndarray:
  """An array, or a layer of it, which may lie on several devices or hosts."""
  if not isinstance(part, Array) or part.sharding.num_devices == 1:
    return np.asarray(part) if layer is None else np.asarray(part)[layer]
  assert isinstance(part.sharding, NamedSharding)
  everywhere = NamedSharding(part.sharding.mesh, PartitionSpec())
  return np.asarray(_gather(everywhere, layer is not None)(part, layer or 0))


@functools.cache
def _gather(everywhere: NamedSharding, stacked: bool) -> jax.stages.Wrapped:
  return jax.jit(
    lambda x, layer: x[layer] if stacked else x, out_shardings=everywhere
  )
