"""A shard's key makes its part of the whole batch's bits, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.errors import UserError
from vera_jax.train.shard_keys import _first_index, shard_keys


def draw(key, rows):
  """As dropout in a scanned stack draws: split, folded, one mask a layer."""
  keys = jax.random.split(jax.random.fold_in(key, 7), 3)
  masks = jax.vmap(lambda k: jax.random.bernoulli(k, 0.3, (rows, 5, 3)))(keys)
  return jnp.moveaxis(masks, 0, 1)


@pytest.mark.smoke
@pytest.mark.parametrize("shards", [2, 8])
def test_shards_draw_the_whole_mask(shards):
  key = jax.random.key(4)
  parts = jax.vmap(lambda k: draw(k, 16 // shards))(shard_keys(key, shards))
  whole = draw(key, 16)
  np.testing.assert_array_equal(parts.reshape(whole.shape), whole)
  assert len({np.asarray(part).tobytes() for part in parts}) == shards


@pytest.mark.parametrize(
  "shard, size", [(300, 2**31 + 12345), (65535, 2**32 - 1), (0, 7)]
)
def test_where_a_shard_begins(shard, size):
  high, low = _first_index(jnp.uint32(shard), size)
  assert (int(high) << 32) + int(low) == shard * size


def test_other_keys_are_refused_by_name():
  with pytest.raises(UserError, match="threefry2x32 keys.*this key is rbg"):
    shard_keys(jax.random.key(0, impl="rbg"), 2)
