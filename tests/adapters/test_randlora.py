"""RandLoRA: the paper's sum, in both orientations, and the count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Site, Target
from vera_jax.adapters.randlora import randlora
from vera_jax.errors import UserError

RANK = 3


@pytest.mark.parametrize("inputs, outputs", [(7, 10), (10, 7), (7, 7)])
def test_a_sum_of_random_matrices_scaled(inputs, outputs):
  """As the paper writes it, of B's columns in PEFT's order."""
  method = randlora(RANK, alpha=5.0)
  target = {("wide",): Target(12, 9), ("layer",): Target(inputs, outputs)}
  shared = method.shared(target)
  fewer, more = min(inputs, outputs), max(inputs, outputs)
  n = math.ceil(fewer / RANK)
  assert shared["A"].shape == (RANK, min(12, max(9, outputs)))
  site = Site(
    ("layer",),
    inputs,
    outputs,
    lambda: jnp.zeros((inputs, outputs)),
    shared=shared,
  )
  rng = np.random.default_rng(0)
  start = method.init(jax.random.key(0), site)
  assert start["randlora_gamma"].max() == pytest.approx(1 / fewer)
  leaves = {k: rng.normal(size=x.shape) for k, x in start.items()}
  A, B = (np.asarray(shared[name], np.float64) for name in "AB")
  total = np.zeros((more, fewer))
  for j in range(n):
    columns = [p * n + j for p in range(RANK)]
    scaled = np.diag(leaves["randlora_lambda"][:, j]) @ A[:, :fewer]
    total += B[:more, columns] @ scaled @ np.diag(leaves["randlora_gamma"][j])
  kernel = 5 / RANK * (total.T if inputs <= outputs else total)
  leaves = {k: jnp.asarray(x, jnp.float32) for k, x in leaves.items()}
  found, bias = method.weights(leaves, site)
  np.testing.assert_allclose(found, kernel, atol=1e-5)
  assert bias is None
  assert np.linalg.matrix_rank(found) == fewer  # the rank is full


def test_the_count_and_the_variance():
  """n (r + min) per layer: RoBERTa-base, query and value, r = 32."""
  targets = {(name,): Target(768, 768, (12,)) for name in ("query", "value")}
  assert adapter_size(randlora(32), targets) == 24 * 24 * (32 + 768)
  shared = randlora(8).shared({("layer",): Target(64, 300)})
  assert shared["B"].shape == (300, 64)
  for matrix in shared.values():
    assert abs(float(jnp.std(matrix)) - 1) < 0.03
  assert abs(float(jnp.corrcoef(shared["A"][0], shared["B"][0])[0, 1])) < 0.3


def test_what_is_refused():
  with pytest.raises(UserError, match="rank is 0"):
    randlora(0)
  with pytest.raises(UserError, match="choose from uniform, peft"):
    randlora(init="orthogonal")
