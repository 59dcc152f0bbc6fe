"""PVeRA: what is drawn, from which distribution, and the count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.counting import adapter_size, plans_at
from vera_jax.adapters.interface import Site, Target
from vera_jax.adapters.pvera import pvera
from vera_jax.errors import UserError

RANK, IN, OUT = 3, 5, 4
RNG = np.random.default_rng(0)
LEAVES = {
  "pvera_d": jnp.asarray(RNG.normal(size=2 * RANK), jnp.float32),
  "pvera_b": jnp.asarray(RNG.normal(size=OUT), jnp.float32),
}
SHARED = {  # wider than the site, which takes the first columns and rows
  "A": jnp.asarray(RNG.normal(size=(2 * RANK, IN + 1)), jnp.float32),
  "B": jnp.asarray(RNG.normal(size=(OUT + 2, RANK)), jnp.float32),
}
W0 = jnp.asarray(RNG.normal(size=(IN, OUT)), jnp.float32)
SITE = Site(("layer",), IN, OUT, lambda: W0, shared=SHARED)


def test_the_equation():
  """In float64, without noise and with the noise of a key."""
  x = RNG.normal(size=(20_000, IN))
  x[:] = x[0]
  A, B = (np.asarray(SHARED[k], np.float64) for k in "AB")
  d, b = (np.asarray(LEAVES[f"pvera_{k}"], np.float64) for k in "db")
  both = d * (x[0] @ A[:, :IN].T)
  mu, deviation = both[:RANK], np.exp(both[RANK:] / 2)
  B, rows = b[:, None] * B[:OUT], jnp.asarray(x, jnp.float32)
  still, penalty = adapted_product(pvera(RANK), LEAVES, SITE, rows)
  assert penalty is None
  want = x[0] @ np.asarray(W0, np.float64) + B @ mu
  np.testing.assert_allclose(still[0], want, atol=1e-5)
  drawn, _ = adapted_product(
    pvera(RANK), LEAVES, SITE, rows, key=jax.random.key(0)
  )
  covariance = B @ np.diag(deviation**2) @ B.T  # every token has its own noise
  spread = np.sqrt(np.diag(covariance).max())
  np.testing.assert_allclose(drawn.mean(0), want, atol=0.03 * spread)
  np.testing.assert_allclose(
    np.cov(np.asarray(drawn).T), covariance, atol=0.05 * spread**2
  )


def test_the_count_and_the_plan():
  """2 r + out per layer; the noise needs the factored order."""
  targets = {("query",): Target(768, 768, (12,)), ("value",): Target(768, 768)}
  assert adapter_size(pvera(256), targets) == 13 * (2 * 256 + 768)
  tokens = dict.fromkeys(targets, 10_000)
  assert set(plans_at(pvera(8), targets, tokens).values()) == {"factored"}


def test_what_is_refused():
  with pytest.raises(UserError, match="rank is 0"):
    pvera(0)
  with pytest.raises(UserError, match="init is 'none'"):
    pvera(init="none")
