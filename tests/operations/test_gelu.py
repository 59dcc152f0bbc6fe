"""GELU: right in value and slope, at every precision, and lean to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.stats import norm

from vera_jax.operations.gelu import gelu

X = np.linspace(-9, 9, 181)


@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)]
)
def test_value_and_slope(dtype, tolerance):
  x = jnp.asarray(X, dtype)
  exact = np.asarray(x, np.float64)
  slopes = jax.vmap(jax.grad(gelu))(x)
  assert gelu(x).dtype == slopes.dtype == x.dtype
  for found, want in (
    (gelu(x), exact * norm.cdf(exact)),
    (slopes, norm.cdf(exact) + exact * norm.pdf(exact)),
  ):
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)


def test_both_modes_and_the_second_derivative():
  with jax.enable_x64(True):
    check_grads(
      lambda x: gelu(jnp.asarray(x)), (jnp.asarray(X[::20]),), order=2
    )
