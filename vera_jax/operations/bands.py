"""Causal attention within the texts of packed rows, as a band of blocks.

A text of n tokens lies in n columns that follow one another, so no token looks
further back than the longest text is long. The row is cut into blocks of
columns, and each block's queries are compared with the keys of their own block
and of the few before it that a text may reach into:

  row       a a a b | b b c c | c c c c | d d d -     blocks of 4, texts to 7
  keys of the third:  b b c c   c c c c               back = 1 block before it

That costs as much as the texts need, give or take a block, where comparing all
columns with all would grow with the square of the row's length. A row of one
block is compared whole.

The softmax's weights are the layer's largest array. The backward pass computes
them anew instead of keeping them, which takes no longer and a tenth less
memory. Of a row that is compared whole and has LONG columns or more, they are
never there at once: some queries are compared after others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

BLOCK = 32  # columns; 16 to 48 are as fast
LONG, QUERIES = 2048, 128  # columns; and those of the queries compared at once

Blocks = Bool[Array, "_ blocks queries keys"]  # of each row


def cut(length: int, longest: int | None) -> tuple[int, int]:
  """(columns of a block, how many blocks before its own it looks into).

  Args:
    length: of the rows.
    longest: tokens of the longest text in them; None: it may fill a row.
  """
  if longest is not None and length % BLOCK == 0:
    # The first column of a block looks furthest: longest - 1 columns back.
    back = -(-(longest - 1) // BLOCK)
    # Where that is nearly all of the row, blocks would copy keys for nothing.
    if (back + 1) * BLOCK < length:
      return BLOCK, back
  return length, 0


def windows(
  x: Shaped[Array, "rows *heads length k"], block: int, back: int
) -> Shaped[Array, "rows *heads blocks keys k"]:
  """Each block's columns behind those of the blocks before it.

  Slices rather than a gather, whose gradient would be a slow scatter.
  """
  *front, length, width = x.shape
  # The first blocks of a row have none before them: they get zeros, which
  # `masks` hides.
  none = ((0, 0),) * len(front)
  padded = jnp.pad(x, (*none, (back * block, 0), (0, 0)))
  # Shifted by whole blocks, the row has each block's i-th predecessor in the
  # block's own place; side by side they are what the block's queries see.
  shifted = [
    padded[..., i * block : i * block + length, :].reshape(
      *front, length // block, block, width
    )
    for i in range(back + 1)
  ]
  return jnp.concatenate(shifted, axis=-2)


def masks(
  segment_ids: Int[Array, "rows length"],
  positions: Int[Array, "rows length"],
  *,
  longest: int | None,
  window: int | None,
) -> tuple[Blocks, Blocks | None]:
  """Which of its block's keys each query attends to: those of its own text up
  to itself, and with a sliding `window` the nearest of them."""
  rows, length = segment_ids.shape
  block, back = cut(length, longest)
  shape = (rows, length // block, block, 1)

  # The ids of a block's keys are cut as the keys themselves are, so that a row
  # of the mask lies against the products' row.
  def of_keys(x: Array) -> Array:
    return windows(x[..., None], block, back)[..., 0][:, :, None]

  keys, queries = np.arange((back + 1) * block), np.arange(block)
  # A block's own columns are the last of its keys, behind `back` blocks.
  causal = keys <= queries[:, None] + back * block
  # + 1, for windows have zeros before a row's start, and padding's segment is 0
  seen = segment_ids.reshape(shape) + 1 == of_keys(segment_ids + 1)
  seen = seen & causal[None, None]
  if window is None:
    return seen, None
  # Positions restart in each text, but within a text they tell distances.
  apart = positions.reshape(shape) - of_keys(positions)
  return seen, seen & (apart < window)


def attend(
  query: Float[Array, "parts part heads k"],
  key: Float[Array, "parts part kv_heads k"],
  value: Float[Array, "parts part kv_heads k"],
  mask: Blocks,
  *,
  scale: float | Array,
  dropout: Callable[[Array], Array],
) -> Float[Array, "parts part width"]:
  """softmax(scale q k) v, each head of k and v for a group of q's heads.

  Scores and softmax are in float32; `dropout` is put on the weights. Parts are
  whole rows, or their blocks below one another.
  """
  *shape, heads, width = query.shape
  rows, number, block, keys = mask.shape
  groups = key.shape[2]
  # Heads in front: every product is then one of whole matrices, the queries of
  # a group below one another.
  split = (rows, number, block, groups, heads // groups, width)
  query = (query * scale).astype(value.dtype).reshape(split)
  query = query.transpose(0, 3, 1, 4, 2, 5)
  below = (rows, groups, number, heads // groups * block)
  key, value = (
    x.reshape(rows, number * block, groups, width).swapaxes(1, 2)
    for x in (key, value)
  )
  one = jnp.ones(())
  if block >= LONG and block % QUERIES == 0 and dropout(one) is one:
    context = _attend_in_turn(query[:, :, 0], key, value, mask[:, 0])
    return context.transpose(0, 3, 1, 2, 4).reshape(*shape, -1)
  mask = jnp.broadcast_to(
    mask[:, None, :, None], (*query.shape[:-1], keys)
  ).reshape(*below, keys)
  # The weights exist only inside `_attend`, so dropout is drawn on ones and
  # multiplied in there; it must be the same in both passes.
  ones = jnp.ones(mask.shape, jnp.float32)
  kept: Any = dropout(ones)
  kept = None if kept is ones else kept  # dropout is off
  back = keys // block - 1
  context = _attend(
    query.reshape(*below, width), key, value, mask, kept, block, back
  )
  context = context.reshape(query.shape).transpose(0, 2, 4, 1, 3, 5)
  return context.reshape(*shape, -1)


@jax.custom_vjp
def _attend_in_turn(
  query: Float[Array, "rows groups heads length k"],
  key: Float[Array, "rows groups length k"],
  value: Float[Array, "rows groups length k"],
  mask: Bool[Array, "rows length keys"],
) -> Float[Array, "rows groups heads length k"]:
  """As `_attend` of whole rows, for QUERIES columns after others."""
  return _forward_in_turn(query, key, value, mask)[0]


def _in_turn(x: Array, axis: int) -> Array:
  """An axis of columns as one in front, of turns, and one in its place."""
  shape = (*x.shape[:axis], -1, QUERIES, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def _turn(query: Array, mask: Array) -> tuple[Array, Array]:
  """A turn's queries and mask as `_forward` and `_backward` take them."""
  rows, groups, heads, _, width = query.shape
  query = query.reshape(rows, groups, 1, heads * QUERIES, width)
  mask = jnp.broadcast_to(
    mask[:, None, None, None], (rows, groups, 1, heads, *mask.shape[1:])
  )
  return query, mask.reshape(*query.shape[:-1], -1)


def _forward_in_turn(query, key, value, mask):
  length = key.shape[2]

  def compare(turn):
    one, seen = _turn(*turn)
    context, (*_, total) = _forward(one, key, value, seen, None, length, 0)
    of_heads = turn[0].shape[:-1]
    return context.reshape(turn[0].shape), total.reshape(*of_heads, 1)

  turns = _in_turn(query, 3), _in_turn(mask, 1)
  compared = jax.lax.map(compare, turns)
  context, total = (
    jnp.moveaxis(x, 0, 3).reshape(*query.shape[:4], -1) for x in compared
  )
  return context, (query, key, value, mask, context, total)


def _backward_in_turn(saved, slope):
  query, key, value, mask, context, total = saved
  length = key.shape[2]

  def compare(sums, turn):
    one, seen, *others = turn
    one, seen = _turn(one, seen)
    context, total, slope = (
      x.reshape(*one.shape[:-1], x.shape[-1]) for x in others
    )
    kept = one, key, value, seen, None, context, total
    to_query, *to_both, _, _ = _backward(length, 0, kept, slope)
    sums = [x + y.astype(x.dtype) for x, y in zip(sums, to_both, strict=True)]
    return sums, to_query.reshape(turn[0].shape)

  wide = jnp.promote_types(key.dtype, jnp.float32)
  zeros = [jnp.zeros(x.shape, wide) for x in (key, value)]
  columns = (_in_turn(x, 3) for x in (context, total, slope))
  turns = _in_turn(query, 3), _in_turn(mask, 1), *columns
  (to_key, to_value), to_query = jax.lax.scan(compare, zeros, turns)
  to_query = jnp.moveaxis(to_query, 0, 3).reshape(query.shape)
  return to_query, to_key.astype(key.dtype), to_value.astype(value.dtype), None


_attend_in_turn.defvjp(_forward_in_turn, _backward_in_turn)


def _product(letters: str, one: Array, two: Array) -> Array:
  # sums of bfloat16 products in float32, of float64's (in tests) in float64
  wide = jnp.promote_types(one.dtype, jnp.float32)
  return jnp.einsum(letters, one, two, preferred_element_type=wide)


def _scores(one: Array, two: Array, mask: Array) -> Array:
  scores = _product("...qk,...sk->...qs", one, two)
  return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, mask, kept, block, back):
  return _forward(query, key, value, mask, kept, block, back)[0]


def _forward(query, key, value, mask, kept, block, back):
  scores = _scores(query, windows(key, block, back), mask)
  # One number a query is kept, from which the backward pass has the softmax
  # again: weight = exp(score - total).
  total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - total)
  if kept is not None:
    weights = weights * kept
  weights, seen = weights.astype(value.dtype), windows(value, block, back)
  context = _product("...qs,...sk->...qk", weights, seen).astype(value.dtype)
  return context, (query, key, value, mask, kept, context, total)


def _backward(block, back, saved, slope):
  # With keys in front of queries two of the three products below read what
  # they multiply as it lies in memory, the other way round one.
  query, key, value, mask, kept, context, total = saved
  # A key lies in the windows of several blocks; the transpose of `windows` sums
  # what they each send back to it.
  widen = partial(windows, block=block, back=back)
  (key, to_key), (value, to_value) = (jax.vjp(widen, x) for x in (key, value))
  turned = mask.swapaxes(-1, -2)
  weights = jnp.exp(_scores(key, query, turned) - total.swapaxes(-1, -2))
  to_weights = _product("...sk,...qk->...sq", value, slope)
  dropped = weights
  if kept is not None:
    kept = kept.swapaxes(-1, -2)
    to_weights, dropped = to_weights * kept, weights * kept
  # A softmax sends back weights * (to_weights - mean). The mean is the sum of
  # weights * to_weights over a query's keys, which equals the product of the
  # context and its slope: a smaller sum.
  mean = _product("...k,...k->...", slope, context)[..., None, :]
  to_scores = (weights * (to_weights - mean)).astype(key.dtype)
  to_query = _product("...sq,...sk->...qk", to_scores, key)
  wide_key = _product("...sq,...qk->...sk", to_scores, query)
  dropped = dropped.astype(slope.dtype)
  wide_value = _product("...sq,...qk->...sk", dropped, slope)
  return (
    to_query.astype(query.dtype),
    *to_key(wide_key.astype(key.dtype)),
    *to_value(wide_value.astype(value.dtype)),
    None,
    None,
  )


_attend.defvjp(_forward, _backward)
