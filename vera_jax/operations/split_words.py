"""Cross-entropy over a table of words that lies in parts on a mesh's devices.

On one device the logits are made for a block of positions after another, each
from the whole table (`cross_entropy.py`). Where `fsdp` splits the table, each
block would gather all of it. Here a block of words follows another instead, for
all of a device's positions: its rows of the table are gathered, used and
dropped, so that a pass gathers the table once and never has all of it.

The sum of exp z and the mean of the table's rows that it weighs, which is the
gradient, are carried along, relative to the largest z so far, as in attention
over blocks of keys:

  total = sum(exp(z - top))      mixed = sum(exp(z - top) E)
  loss = top + log total - wanted z
  its gradient for the hidden state = mixed / total - wanted E

where `wanted` is (1 - e) of the label's and e of the mean over all words.

`tensor` splits the words of every block; each of its devices carries sums of
its words, and these are put together once, behind the last block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int


class Split(NamedTuple):
  """How a mesh divides the rows, and the table of words.

  Attributes:
    mesh: whose `tensor` and `fsdp` split the table.
    rows: into how many parts the rows of a call are split.
  """

  mesh: Mesh | AbstractMesh
  rows: int


class Block(NamedTuple):
  """Words that are compared together.

  Attributes:
    rows: of the table; zeros where there are no more words.
    numbers: of the words; -1 where there are no more.
  """

  rows: Float[Array, "parts words width"]
  numbers: Int[Array, "parts words"]


class Sums(NamedTuple):
  """Of the words so far, each part's alone; the letters are those above."""

  top: Float32[Array, "parts rows reads"]
  total: Float32[Array, "parts rows reads"]
  wanted: Float32[Array, "parts rows reads"]
  mixed: Float32[Array, "parts rows reads width"]
  wanted_row: Float32[Array, "parts rows reads width"]


_SPLIT = ContextVar[Split | None]("split", default=None)


@contextmanager
def words_are_split(split: Split) -> Iterator[None]:
  """A context in which `cross_entropy` compares one block of words after
  another."""
  token = _SPLIT.set(split)
  try:
    yield
  finally:
    _SPLIT.reset(token)


def split_of_words() -> Split | None:
  """The context's; None: the whole table is at hand."""
  return _SPLIT.get()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy_of(
  hidden: Float[Array, "rows reads width"],
  table: Float[Array, "vocab width"],
  labels: Int[Array, "rows reads"],
  smoothing: float,
  split: Split,
  most: int,
) -> Float32[Array, "rows reads"]:
  """`cross_entropy`, with at most so many logits of a block on a device, for
  every position at least one."""
  return _losses_and_slopes(hidden, table, labels, smoothing, split, most)[0]


def _forward(hidden, table, labels, smoothing, split, most):
  trains_table = table.perturbed
  arrays = hidden.value, table.value, labels.value
  losses, to_hidden, log_total = _losses_and_slopes(
    *arrays, smoothing, split, most
  )
  for_table = (*arrays, log_total) if trains_table else None
  return losses, (to_hidden, for_table)


def _backward(smoothing, split, most, kept, slope):
  to_hidden, for_table = kept
  if isinstance(slope, SymbolicZero):
    slope = jnp.zeros(slope.shape, slope.dtype)
  to_table = None
  if for_table is not None:
    hidden, table, labels, log_total = for_table
    to_table = _table_slope(
      hidden, table, labels, log_total, slope, smoothing, split, most
    )
  to_hidden = (slope[..., None] * to_hidden).astype(to_hidden.dtype)
  return to_hidden, to_table, None


cross_entropy_of.defvjp(_forward, _backward, symbolic_zeros=True)


def _losses_and_slopes(
  hidden: Array,
  table: Array,
  labels: Array,
  smoothing: float,
  split: Split,
  most: int,
) -> tuple[Array, Array, Array]:
  """(losses, their gradients for the hidden states, log sum(exp z))."""

  def add(sums: Sums, words: Block) -> tuple[Sums, None]:
    words = _gathered(words, split)
    logits, there = _logits(hidden, words), words.numbers >= 0
    top = jnp.maximum(sums.top, logits.max(-1))
    weights = jnp.exp(logits - top[..., None])
    shrunk = jnp.exp(sums.top - top)
    mixed = jnp.einsum(
      "prcv,pvd->prcd",
      weights.astype(table.dtype),
      words.rows,
      preferred_element_type=jnp.float32,
    )
    # the label's place in the block, if it is in it
    place = labels[None] - words.numbers[:, :1, None]
    place = jnp.clip(place, 0, words.numbers.shape[1] - 1)
    number = jax.vmap(jnp.take)(words.numbers, place)
    share = (1 - smoothing) * (number == labels[None])
    score = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
    label_row = jax.vmap(lambda rows, at: rows[at])(words.rows, place)
    wanted = sums.wanted + share * score
    wanted_row = sums.wanted_row + share[..., None] * label_row
    if smoothing:
      mean = smoothing / len(table)
      there = there[:, None, None]
      wanted += mean * jnp.where(there, logits, 0).sum(-1)
      of_rows = words.rows.sum(1, dtype=jnp.float32)
      wanted_row += mean * of_rows[:, None, None]
    return Sums(
      top,
      shrunk * sums.total + weights.sum(-1),
      wanted,
      shrunk[..., None] * sums.mixed + mixed,
      wanted_row,
    ), None

  parts = split.mesh.shape["tensor"]
  none = jnp.zeros((parts, *labels.shape), jnp.float32)
  rows = jnp.zeros((*none.shape, hidden.shape[-1]), jnp.float32)
  start = Sums(none + jnp.finfo(jnp.float32).min, none, none, rows, rows)
  sums, _ = jax.lax.scan(add, start, _blocks(table, labels, split, most))
  # every part's sums, as if they had been made relative to the highest top
  top = sums.top.max(0)
  scale = jnp.exp(sums.top - top[None])
  total = (scale * sums.total).sum(0)
  slopes = (scale / total[None])[..., None] * sums.mixed - sums.wanted_row
  log_total = top + jnp.log(total)
  losses = log_total - sums.wanted.sum(0)
  return losses, slopes.sum(0).astype(hidden.dtype), log_total


def _table_slope(
  hidden: Array,
  table: Array,
  labels: Array,
  log_total: Array,
  slope: Array,
  smoothing: float,
  split: Split,
  most: int,
) -> Array:
  """The gradient of sum(slope * losses) for the table: the logits again."""
  weighed = (hidden * slope[..., None]).astype(table.dtype)

  def of_block(words: Block) -> Array:
    words = _gathered(words, split)
    to_logits = jnp.exp(_logits(hidden, words) - log_total[None, ..., None])
    is_label = words.numbers[:, None, None] == labels[None, ..., None]
    to_logits -= (1 - smoothing) * is_label + smoothing / len(table)
    return jnp.einsum(
      "rcd,prcv->pvd",
      weighed,
      to_logits.astype(table.dtype),
      preferred_element_type=jnp.float32,
    )

  parts = split.mesh.shape["tensor"]
  slopes = jax.lax.map(of_block, _blocks(table, labels, split, most))
  slopes = jnp.moveaxis(slopes, 0, 1).reshape(parts, -1, table.shape[1])
  slopes = slopes[:, : -(-len(table) // parts)]
  return slopes.reshape(-1, table.shape[1])[: len(table)].astype(table.dtype)


def _blocks(table: Array, labels: Array, split: Split, most: int) -> Block:
  """The blocks, on an axis in front, of words in as many parts as `tensor`.

  A device with the rows of a call has `most` logits of a block at most.
  """
  parts, words = split.mesh.shape["tensor"], len(table)
  each = -(-words // parts)
  positions = labels.size // split.rows
  number = -(-each // max(1, most // positions))
  columns = -(-each // number)  # of equal size: the fewest zeros

  def cut(array: Array, empty: int) -> Array:
    rest = array.shape[1:]
    beside = ((0, 0),) * len(rest)
    array = jnp.pad(
      array, ((0, parts * each - words), *beside), constant_values=empty
    ).reshape(parts, each, *rest)
    # within a part, since `tensor` splits the table into these
    array = jnp.pad(
      array,
      ((0, 0), (0, number * columns - each), *beside),
      constant_values=empty,
    ).reshape(parts, number, columns, *rest)
    return jnp.moveaxis(array, 1, 0)

  return Block(cut(table, 0), cut(jnp.arange(words, dtype=jnp.int32), -1))


def _gathered(block: Block, split: Split) -> Block:
  """With the rows' width whole on each device."""
  sharding = NamedSharding(split.mesh, PartitionSpec("tensor", None, None))
  return block._replace(
    rows=jax.lax.with_sharding_constraint(block.rows, sharding)
  )


def _logits(
  hidden: Float[Array, "rows reads width"], block: Block
) -> Float32[Array, "parts rows reads words"]:
  """The scores of a block's words; the lowest where there are no more."""
  logits = jnp.einsum(
    "rcd,pvd->prcv", hidden, block.rows, preferred_element_type=jnp.float32
  )
  there = block.numbers[:, None, None] >= 0
  return jnp.where(there, logits, jnp.finfo(jnp.float32).min)
