"""Attention by blocks: that of whole rows, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.operations import bands

LENGTHS = ((20, 7, 33, 2, 30), (33, 33, 28, 1))  # of texts, in rows of 96
LENGTH, HEADS, GROUPS, WIDTH = 96, 4, 2, 8


def rows():
  segments, positions = np.zeros((2, 2, LENGTH), np.int32)
  for row, lengths in enumerate(LENGTHS):
    start = 0
    for number, n in enumerate(lengths):
      segments[row, start : start + n] = number + 1
      positions[row, start : start + n] = np.arange(n)
      start += n
  return jnp.asarray(segments), jnp.asarray(positions)


def plain(query, key, value, mask, kept=1.0):
  """As the equation says, all columns with all."""
  key, value = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
  scores = 0.3 * jnp.einsum("rqhk,rshk->rhqs", query, key)
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)) * kept
  return jnp.einsum("rhqs,rshk->rqhk", weights, value).reshape(2, LENGTH, -1)


def heads():
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal((2, LENGTH, n, WIDTH)), jnp.float32)
    for n in (HEADS, GROUPS, GROUPS, HEADS)
  ]


def assert_alike(one, other, slope):
  """Values and gradients of query, key and value, for some slope."""
  *inputs, slope = *heads()[:3], slope.reshape(2, LENGTH, -1)
  (want, back), (got, other_back) = (
    jax.vjp(jax.jit(f), *inputs) for f in (one, other)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip(other_back(slope), back(slope), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("longest", [33, None, "in turn"])
@pytest.mark.parametrize("window", [None, 5])
def test_blocks_are_whole_rows(longest, window, monkeypatch):
  if longest == "in turn":  # as rows of LONG columns are
    monkeypatch.setattr(bands, "LONG", 64)
    monkeypatch.setattr(bands, "QUERIES", 32)
    longest = None
  segments, positions = rows()
  column = np.arange(LENGTH)
  mask = (segments[:, :, None] == segments[:, None]) & (
    column[:, None] >= column
  )[None]
  if window is not None:
    mask &= positions[:, :, None] - positions[:, None] < window
  found = bands.masks(segments, positions, longest=longest, window=window)
  blocks = found[0] if window is None else found[1]
  assert blocks.shape[1:] == ((3, 32, 64) if longest else (1, 96, 96))
  assert int(blocks.sum()) == int(mask.sum())

  def by_blocks(q, k, v):
    return bands.attend(q, k, v, blocks, scale=0.3, dropout=lambda x: x)

  assert_alike(lambda *x: plain(*x, mask), by_blocks, heads()[3])


def test_dropout_is_on_the_weights():
  segments, positions = rows()
  mask, _ = bands.masks(segments, positions, longest=None, window=None)
  kept = np.random.default_rng(3).integers(0, 2, (2, HEADS, LENGTH, LENGTH))
  kept = jnp.asarray(2.0 * kept, jnp.float32)

  def by_blocks(q, k, v):
    def drop(x):
      return x * kept.reshape(x.shape)

    return bands.attend(q, k, v, mask, scale=0.3, dropout=drop)

  assert_alike(lambda *x: plain(*x, mask[:, 0], kept), by_blocks, heads()[3])


def test_when_a_row_is_one_block():
  assert bands.cut(96, None) == (96, 0)
  assert bands.cut(96, 33) == (32, 1)
  assert bands.cut(96, 34) == (96, 0)  # as much work, and no slices
  assert bands.cut(96, 1) == (32, 0)
  assert bands.cut(100, 4) == (100, 0)
