"""LoRA-XS: its factors are W0's, with signs that a rule fixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adapters.conftest import Net
from vera_jax import UserError, adapt, label_tree, split
from vera_jax.adapters.interface import Site
from vera_jax.adapters.lora_xs import lora_xs

RANK = 3


def site_of(kernel):
  shape = kernel.shape[-2:]
  return Site(("query",), *shape, lambda: jnp.asarray(kernel))


def independent(W0, R, alpha):
  """x -> x W0 + alpha / r x A R B in float64, its factors by numpy."""
  U, S, Vt = np.linalg.svd(W0.astype(np.float64), full_matrices=False)
  for k in range(RANK):
    if U[np.abs(U[:, k]).argmax(), k] < 0:
      U[:, k], Vt[k] = -U[:, k], -Vt[k]
  A, B = U[:, :RANK] @ np.diag(S[:RANK]), Vt[:RANK]
  return A, B, W0 + alpha / RANK * A @ R.astype(np.float64) @ B


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_the_adapted_weights_are_those_of_an_independent_computation(shape):
  rng = np.random.default_rng(0)
  W0 = rng.normal(size=shape).astype(np.float32)
  R = rng.normal(size=(RANK, RANK)).astype(np.float32)
  method, site = lora_xs(RANK, alpha=7.0), site_of(W0)
  factors = method.shared({site.path: site})["query"]
  A, B, expected = independent(W0, R, alpha=7.0)
  np.testing.assert_allclose(factors["A"], A, atol=1e-5)
  np.testing.assert_allclose(factors["B"], B, atol=1e-5)
  site = site._replace(shared=factors)
  adapted, _ = method.weights({"lora_xs_R": jnp.asarray(R)}, site)
  # what is within 1e-5 in the factors, R and the scale make larger
  atol = 1e-5 * 7.0 / RANK * np.abs(R).sum()
  np.testing.assert_allclose(adapted, expected, rtol=0, atol=atol)


def test_signs_do_not_depend_on_who_decomposes(monkeypatch):
  W0 = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
  site, svd = site_of(W0), jnp.linalg.svd
  ours = lora_xs(RANK).shared({site.path: site})["query"]

  def flipped(kernel, **options):
    U, S, V = svd(kernel, **options)
    signs = jnp.asarray([-1.0, 1, -1, -1])
    return U * signs[None, None], S, signs[None, :, None] * V

  monkeypatch.setattr(jnp.linalg, "svd", flipped)
  theirs = lora_xs(RANK).shared({site.path: site})["query"]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_narrow_layer_has_as_many_directions_as_it_is_wide():
  site = site_of(np.eye(6, 2, dtype=np.float32))
  leaves = lora_xs(5).init(jax.random.key(0), site)
  assert leaves["lora_xs_R"].shape == (2, 2)
  assert lora_xs(5).shared({site.path: site})["query"]["A"].shape == (6, 2)


def test_the_papers_start_is_close_to_the_base():
  site = site_of(np.eye(400, 300, dtype=np.float32))
  R = lora_xs(200, init_std=1e-5).init(jax.random.key(0), site)["lora_xs_R"]
  np.testing.assert_allclose(jnp.std(R), 1e-5, rtol=0.02)
  assert not lora_xs(200).init(jax.random.key(0), site)["lora_xs_R"].any()
  with pytest.raises(UserError, match="init_std is -1"):
    lora_xs(init_std=-1.0)


def test_it_is_loaded_on_its_own_base_alone(base, x, tmp_path):
  """The factors lie in no file, and the base is told by its fingerprint."""
  module = adapt(Net("looped"), lora_xs(2), targets=("out",))
  variables = module.init_on({"params": base}, jax.random.key(0), x)
  labels = label_tree(variables["params"], module.adapter)
  trainable, _ = split(variables["params"], labels)
  module.save(tmp_path, trainable, variables)
  loaded = module.load(tmp_path, {"params": base}, x)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  other = jax.tree.map(lambda leaf: leaf + 1, base)
  with pytest.raises(UserError, match="fingerprint"):
    module.load(tmp_path, {"params": other}, x)
