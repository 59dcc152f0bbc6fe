"""LayerNorm: flax's values, gradients and parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vera_jax.operations.norm import LayerNorm, standardise

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (2, 3, 8)).astype(np.float32)


@pytest.mark.parametrize(
  "dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)]
)
def test_the_same_as_flax(dtype, tolerance):
  ours = LayerNorm(1e-6, dtype, dtype)
  flax = nn.LayerNorm(1e-6, dtype, dtype, use_fast_variance=False)
  x = jnp.asarray(X, dtype)
  params = ours.init(jax.random.key(0), x)
  shapes = jax.eval_shape(flax.init, jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(RNG.normal(1, 1, leaf.shape), leaf.dtype), params
  )
  weights = jnp.asarray(RNG.normal(0, 1, x.shape), jnp.float32)

  def total(module, params, x):
    return jnp.sum(weights * module.apply(params, x))

  found, want = (
    jax.value_and_grad(lambda p, x, m=m: total(m, p, x), (0, 1))(params, x)
    for m in (ours, flax)
  )
  for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    assert one.dtype == other.dtype
    one, other = (np.asarray(leaf, np.float64) for leaf in (one, other))
    scale = np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def test_its_derivative():
  with jax.enable_x64(True):
    x = jnp.asarray(X[0], jnp.float64)
    check_grads(lambda x: standardise(jnp.asarray(x), 1e-6), (x,), order=2)
