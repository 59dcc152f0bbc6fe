"""Uni-LoRA: one vector shared out evenly, in one order, keeping lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Site, Target
from vera_jax.adapters.projections import digest
from vera_jax.adapters.unilora import unilora
from vera_jax.errors import UserError

SIZE, RANK = 30, 2
LOOPED = {
  ("first",): Target(5, 8),
  **{
    (f"layer_{i}", name): Target(8, 6) for i in range(2) for name in ("q", "v")
  },
  ("last",): Target(8, 3),
}


def test_the_map_from_theta_keeps_lengths():
  """Its columns are orthonormal: every entry is used, equally often."""
  method = unilora(RANK, size=SIZE)
  shared = method.shared(LOOPED)
  indices = np.concatenate(
    [x.flatten() for path, x in flatten_dict(shared).items() if len(path) > 1]
  )
  counts = np.bincount(indices)
  assert len(counts) == SIZE and np.ptp(counts) <= 1
  theta = method.common(jax.random.key(0), {})["unilora_theta"]
  assert 0 < jnp.abs(theta).max() <= 0.02
  made = np.asarray(theta * shared["scale"])[indices]
  np.testing.assert_allclose(np.linalg.norm(made), np.linalg.norm(theta), 1e-5)


def test_looped_and_stacked_layers_get_the_same_indices():
  stacked = {
    ("first",): Target(5, 8),
    **{("layer", name): Target(8, 6, (2,)) for name in ("q", "v")},
    ("last",): Target(8, 3),
  }
  method = unilora(RANK, size=SIZE)
  one, other = method.shared(LOOPED), method.shared(stacked)
  np.testing.assert_array_equal(
    one["layer_1"]["v"]["B"], other["layer"]["v"]["B"][1]
  )
  assert digest(one) == digest(other)
  assert digest(one) != digest(unilora(RANK, size=SIZE + 1).shared(LOOPED))


def test_the_delta_is_b_a():
  method = unilora(RANK, size=SIZE)
  shared = method.shared(LOOPED)
  theta = jnp.asarray(np.random.default_rng(0).normal(size=SIZE), jnp.float32)
  own = shared["layer_0"]["q"] | {"scale": shared["scale"]}
  site = Site(
    ("layer_0", "q"),
    8,
    6,
    lambda: jnp.ones((8, 6)),
    shared=own,
    common={"unilora_theta": theta},
  )
  entries = np.asarray(theta * shared["scale"], np.float64)
  A, B = entries[own["A"]], entries[own["B"]]
  kernel, _ = method.weights({}, site)
  np.testing.assert_allclose(kernel, 1 + (B @ A).T, atol=1e-5)


def test_the_count_is_the_vectors_length():
  assert adapter_size(unilora(RANK, size=SIZE), LOOPED) == SIZE


def test_what_is_refused():
  with pytest.raises(UserError, match="size is 0"):
    unilora(size=0)
  with pytest.raises(UserError, match="projection_seed is -1"):
    unilora(projection_seed=-1)
