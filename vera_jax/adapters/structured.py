"""A random matrix that is never stored: signs around an orthogonal transform.

  S = scale * sums / sqrt(n / m) * (signs * H) * signs              (m x n)

The second signs are one per input. H is orthogonal and a Kronecker product of
small blocks, so that it is a reshape and a small product per block: 128 x 128
for a width of 16384. The first signs are one per output of H. Each result
of S x is the signed sum of every m-th output, n / m of them, over the root of
n / m. So the rows are orthogonal, have equal lengths, and no two columns are
alike; all there is to keep are two signs per column.

Taking m of H's outputs in place of sums would be as good with m drawn ones (the
subsampled randomised Hadamard transform of Ailon and Chazelle), but that is a
gather, and a scatter on the way back. The first m of them are no choice: where
H is Hadamard's matrix they can't tell input j from input j + m.

Where there are more rows than columns, x is padded with zeros up to the number
of rows; then the columns are orthogonal and have equal lengths. A block is
Hadamard's matrix for the powers of two in its size and the DCT-II for what is
odd. A width with a prime factor above 128 has no blocks: x is padded up to the
next one that has, and what is orthogonal is so on average.
"""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int8, PRNGKeyArray

from vera_jax.operations.precision import exact

LARGEST = 128  # rows of a block: a TPU's matrix unit is as wide


class Structured(struct.PyTreeNode):
  """A structured matrix (rows x columns), or by `T` its transpose.

  It stands where a matrix does: `x @ S` and `S @ y`, computed in the type of x
  or y, `S.T`, `S.shape`, `numpy.asarray(S)`. Stacked signs are of as many
  matrices, for vmap and scans.

  Attributes:
    signs: (2, width of the transform) in int8: of its inputs and its outputs.
    drawn: the rows that there are; `rows` are the leading ones in use.
    columns: n.
    scale: the root of the transform's width times an entry's variance.
    turned: whether this is the transpose.
  """

  signs: Any
  drawn: int = struct.field(pytree_node=False)
  rows: int = struct.field(pytree_node=False)
  columns: int = struct.field(pytree_node=False)
  scale: float = struct.field(pytree_node=False)
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, int]:
    shape = self.rows, self.columns
    return shape[::-1] if self.turned else shape

  @property
  def T(self) -> "Structured":
    return self.replace(turned=not self.turned)

  @property
  def definition(self) -> tuple[Any, ...]:
    """What says with the signs which matrix it is."""
    return self.drawn, self.columns, self._blocks

  def leading(self, rows: int) -> "Structured":
    """The matrix of the first rows alone."""
    return self.replace(rows=rows)

  def astype(self, dtype: DTypeLike) -> "Structured":
    """Itself: products are computed in the type of what they are with."""
    del dtype
    return self

  def cost(self, vectors: int) -> int:
    """Multiply-adds of the product with as many vectors."""
    return min(self._by_blocks(vectors), self._by_matrix(vectors))

  def matrix(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "_ _"]:
    """All entries, by applying it to an identity."""
    entries = self._to_columns(jnp.eye(self.rows, dtype=dtype))
    return entries.T if self.turned else entries

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    with exact():
      return np.asarray(jax.jit(Structured.matrix)(self), dtype)

  def __rmatmul__(self, x: Float[Array, "*t _"]) -> Float[Array, "*t _"]:
    vectors = math.prod(x.shape[:-1])
    if self._by_matrix(vectors) < self._by_blocks(vectors):
      return x @ self.matrix(x.dtype)  # it has a few rows only
    return self._to_rows(x) if self.turned else self._to_columns(x)

  def __matmul__(self, y: Float[Array, "_ o"]) -> Float[Array, "_ o"]:
    return (y.T @ self.T).T

  @property
  def _blocks(self) -> tuple[int, ...]:
    return blocks(max(self.drawn, self.columns))

  def _by_blocks(self, vectors: int) -> int:
    return vectors * math.prod(self._blocks) * sum(self._blocks)

  def _by_matrix(self, vectors: int) -> int:
    return self._by_blocks(self.rows) + vectors * self.rows * self.columns

  def _to_rows(self, x: Float[Array, "*t n"]) -> Float[Array, "*t r"]:
    """S x of every vector."""
    lead, width = x.shape[:-1], math.prod(self._blocks)
    ones = (1,) * len(lead)
    first, second = self.signs.astype(x.dtype).reshape(2, *ones, width)
    first = first * np.asarray(self.scale * width**-0.5, x.dtype)
    y = _padded(x, width) * first
    y = y.reshape(*lead, *self._blocks)
    for size in self._blocks:
      # the block's axis goes behind the others: after all, their order is as
      # before
      block = jnp.asarray(_block(size), x.dtype)
      y = jnp.tensordot(y, block, axes=(len(lead), 0))
    y = y.reshape(*lead, width) * second
    parts = -(-width // self.drawn)  # outputs of the transform in each sum
    y = _padded(y, parts * self.drawn)
    y = y.reshape(*lead, parts, self.drawn).sum(-2)
    there = np.bincount(np.arange(width) % self.drawn)
    lengths = jnp.asarray(there**-0.5, x.dtype).reshape(*ones, -1)
    return (y * lengths)[..., : self.rows]

  def _to_columns(self, y: Float[Array, "*t r"]) -> Float[Array, "*t n"]:
    """y^T S of every vector."""
    x = jax.ShapeDtypeStruct((*y.shape[:-1], self.columns), y.dtype)
    (x,) = jax.linear_transpose(self._to_rows, x)(y)
    return x


def as_array(matrix: Any, dtype: DTypeLike) -> Float[Array, "_ _"]:
  """A structured matrix in full, any other as it is: for what can't `@` it."""
  return matrix.matrix(dtype) if isinstance(matrix, Structured) else matrix


def draw(
  key: PRNGKeyArray, rows: int, columns: int, *, variance: float
) -> Structured:
  """A structured matrix whose entries have this variance, over all keys."""
  width = math.prod(blocks(max(rows, columns)))
  return Structured(
    signs=random_signs(key, (2, width)),
    drawn=rows,
    rows=rows,
    columns=columns,
    scale=math.sqrt(width * variance),
  )


def random_signs(
  key: PRNGKeyArray, shape: tuple[int, int]
) -> Int8[Array, "..."]:
  """1 or -1, by one bit each: the same on any device."""
  bits = jax.random.bits(key, shape, jnp.uint32) >> 31
  return 1 - 2 * bits.astype(jnp.int8)


@cache
def blocks(width: int) -> tuple[int, ...]:
  """The sizes of the blocks: as few as there can be, then as small as can be.

  Their product is the width, or the next one that has such blocks.
  """
  while True:
    for number in range(1, max(width.bit_length(), 2)):
      if ways := _factors(width, number, LARGEST):
        return min(ways, key=sum)
    width += 1


def _factors(width: int, number: int, largest: int) -> list[tuple[int, ...]]:
  """All ways to write it as so many factors, in descending order."""
  if number == 1:
    return [(width,)] if width <= largest else []
  return [
    (first, *rest)
    for first in range(min(width, largest), 1, -1)
    if width % first == 0
    for rest in _factors(width // first, number - 1, first)
  ]


def _padded(x: Array, width: int) -> Array:
  """With zeros behind, along the last axis."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


@cache
def _block(size: int) -> np.ndarray:
  """A matrix of orthogonal columns, whose squares are 1 on average."""
  odd = size // (size & -size)
  places = np.arange(odd)
  dct = np.cos(np.pi / odd * (places[:, None] + 0.5) * places)
  dct[:, 1:] *= np.sqrt(2)
  made = dct
  while len(made) < size:
    made = np.kron(made, [[1, 1], [1, -1]])
  return made
