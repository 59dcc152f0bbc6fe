"""LoRA, the baseline: formula, scale and where it starts.

Gradients and counts are checked beside VeRA's in test_vera.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Site, Target
from vera_jax.adapters.lora import lora, lora_fa
from vera_jax.errors import UserError


@pytest.mark.parametrize(
  "alpha, scaling, divisor", [(8.0, "rank", 2), (3.0, "root", 2**0.5)]
)
def test_the_delta_is_alpha_over_r_times_b_a_x(alpha, scaling, divisor):
  rng = np.random.default_rng(0)
  A, B = rng.normal(size=(2, 4)), rng.normal(size=(3, 2))
  x = rng.normal(size=(5, 4))
  want = alpha / divisor * np.stack([B @ A @ row for row in x])
  leaves, inputs = jax.tree.map(
    lambda a: jnp.asarray(a, jnp.float32), ({"lora_A": A, "lora_B": B}, x)
  )
  site = Site(("layer",), 4, 3, lambda: jnp.zeros((4, 3)))
  method = lora(2, alpha=alpha, scaling=scaling)
  got, _ = adapted_product(method, leaves, site, inputs, plan="factored")
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  kernel, bias = method.weights(leaves, site)
  np.testing.assert_allclose(x @ kernel, want, rtol=1e-5, atol=1e-5)
  assert bias is None


def test_where_the_matrices_start():
  """A as torch starts it: uniform up to 1 / sqrt(in), variance 1 / (3 in)."""
  site = Site(("layer",), 400, 7, lambda: jnp.zeros((400, 7)))
  values = lora(50).init(jax.random.key(0), site)
  assert {name: value.shape for name, value in values.items()} == {
    "lora_A": (50, 400),
    "lora_B": (7, 50),
  }
  bound = 400**-0.5
  assert 0.99 * bound < jnp.abs(values["lora_A"]).max() <= bound
  np.testing.assert_allclose(jnp.var(values["lora_A"]), 1 / 1200, rtol=0.05)
  assert not values["lora_B"].any()


def test_lora_fa_trains_b_alone():
  """A, of LoRA's distribution, is another one in every layer."""
  targets = {("query",): Target(400, 7, (2,))}
  method = lora_fa(50, projection_seed=3)
  assert adapter_size(method, targets) == 2 * 50 * 7
  A = method.shared(targets)["query"]["A"]
  assert A.shape == (2, 50, 400) and jnp.abs(A[0] - A[1]).max() > 0.01
  assert 0.99 * 400**-0.5 < jnp.abs(A).max() <= 400**-0.5
  np.testing.assert_allclose(jnp.var(A), 1 / 1200, rtol=0.05)


def test_what_is_refused():
  for words, settings in {
    "rank is 0": {"rank": 0},
    "scaling is 'r'": {"scaling": "r"},
  }.items():
    with pytest.raises(UserError, match=words):
      lora(**settings)
