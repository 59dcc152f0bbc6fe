"""Dropout keeps the expectation, and is the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vera_jax.operations.dropout import dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("last", [64, 33])
def test_numbers_are_dropped_at_the_rate_and_the_others_scaled(rate, last):
  x = jnp.full((200, 50, last), 3.0)
  y = np.asarray(dropout(jax.random.key(0), x, rate))
  kept = y != 0
  # five standard deviations of a binomial share
  slack = 5 * (rate * (1 - rate) / y.size) ** 0.5
  assert abs(kept.mean() - (1 - rate)) < slack
  np.testing.assert_allclose(y[kept], 3 / (1 - rate), rtol=2e-4)
  # both halves of a random word are used, and they are independent
  halves = kept[..., : last // 2 * 2].reshape(-1, 2)
  assert np.all(np.abs(halves.mean(0) - (1 - rate)) < 2 * slack)
  assert abs(np.corrcoef(halves.T)[0, 1]) < 5 / len(halves) ** 0.5


def test_all_or_nothing():
  x = jnp.arange(6.0).reshape(2, 3)
  key = jax.random.key(1)
  assert not dropout(key, x, 1.0).any()
  np.testing.assert_array_equal(dropout(key, x, 0.0), x)
  gradient = jax.grad(lambda x: dropout(key, x, 1.0).sum())(x)
  assert np.isfinite(gradient).all()


def test_a_split_batch_drops_the_same_numbers():
  mesh = jax.make_mesh((8,), ("data",))
  x = jax.random.normal(jax.random.key(2), (16, 6, 10))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  split = jax.jit(dropout, static_argnums=2, out_shardings=rows)
  key = jax.random.key(3)
  np.testing.assert_array_equal(
    split(key, jax.device_put(x, rows), 0.1), dropout(key, x, 0.1)
  )


def test_other_keys_drop_other_numbers():
  x = jnp.ones((64, 64))
  one, two = (np.asarray(dropout(jax.random.key(k), x, 0.5)) for k in (0, 1))
  assert 0.45 < (one != two).mean() < 0.55
