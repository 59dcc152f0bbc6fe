"""A table of words in codes: rows looked up, and products with all of it.

Dequantised it would be the largest array of a small decoder by far: 671 MB of
Gemma 3's 270 million numbers. So only the rows that are asked for are
dequantised, and in products a block of words after another.

It is a `Quantised` whose stack are the words, each a kernel of a single output:
so a word's codes lie together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int

from vera_jax.operations.quantised import Quantised, dequantise

WORDS = 4096  # at most, that are dequantised together


def look_up(
  table: Quantised, ids: Int[Array, "*ids"]
) -> Float[Array, "*ids width"]:
  """The rows of some words."""
  return dequantise(jax.tree.map(lambda part: part[ids], table))[..., 0]


def times_words(
  hidden: Float[Array, "*t width"], table: Quantised
) -> Float32[Array, "*t vocab"]:
  """hidden @ table.T."""

  def fill(logits: Array, first: Any, rows: Array) -> Array:
    some = jnp.einsum(
      "...d,vd->...v", hidden, rows, preferred_element_type=jnp.float32
    )
    at = (0,) * (logits.ndim - 1)
    return jax.lax.dynamic_update_slice(logits, some, (*at, first))

  shape = *hidden.shape[:-1], table.shape[0]
  return _over_words(table, fill, jnp.zeros(shape, jnp.float32))


def from_words(
  slope: Float[Array, "*t vocab"], table: Quantised
) -> Float32[Array, "*t width"]:
  """slope @ table."""

  def add(total: Array, first: Any, rows: Array) -> Array:
    some = jax.lax.dynamic_slice_in_dim(slope, first, len(rows), axis=-1)
    return total + jnp.einsum(
      "...v,vd->...d", some, rows, preferred_element_type=jnp.float32
    )

  shape = *slope.shape[:-1], table.shape[1]
  return _over_words(table, add, jnp.zeros(shape, jnp.float32))


def _over_words(
  table: Quantised, step: Callable[[Array, Any, Array], Array], value: Array
) -> Array:
  """step(value, number of the first word, their rows), block after block."""
  blocks, rest = divmod(table.shape[0], WORDS)

  def one(value: Array, first: Any, words: int) -> Array:
    rows = jax.tree.map(
      lambda part: jax.lax.dynamic_slice_in_dim(part, first, words), table
    )
    return step(value, first, dequantise(rows)[..., 0])

  if blocks:
    value = jax.lax.fori_loop(
      0, blocks, lambda i, value: one(value, i * WORDS, WORDS), value
    )
  return one(value, blocks * WORDS, rest) if rest else value
