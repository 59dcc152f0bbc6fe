"""A and B: their distributions, and bits that never change.

tests/golden/make_projections.py made the digests.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.slow import rest_is_slow
from vera_jax.adapters.interface import Target
from vera_jax.adapters.projections import digest, make_pair, make_projections
from vera_jax.errors import UserError

GOLDEN = json.loads(
  (Path(__file__).parents[1] / "golden/projections.json").read_text("utf-8")
)
OF_BITS = pytest.mark.parametrize("init", GOLDEN["pairs"][0]["digests"])


@pytest.mark.smoke
@OF_BITS
@pytest.mark.parametrize("golden", rest_is_slow(GOLDEN["pairs"]))
def test_the_bits_are_the_committed_ones(golden, init):
  pair = make_pair(**golden["pair"], init=init)
  assert digest(pair) == golden["digests"][init]


@OF_BITS
@pytest.mark.slow
def test_jit_and_eight_devices_give_the_same_bits(init):
  golden = GOLDEN["pairs"][2]
  make = partial(make_pair, **golden["pair"], init=init)
  mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
  last = PartitionSpec() if init == "structured" else PartitionSpec("data")
  for spec in (PartitionSpec(), last):
    sharding = NamedSharding(mesh, spec)
    pair = jax.jit(make, out_shardings=sharding)()
    assert len(jax.tree.leaves(pair)[0].sharding.device_set) == 8
    assert digest(pair) == golden["digests"][init]
  assert digest(jax.jit(make)()) == golden["digests"][init]


def test_the_bits_of_a_pair_per_layer():
  """The same for layers of their own and for a stack of them."""
  looped = {(f"layer_{i}", "query"): Target(12, 16) for i in range(2)}
  stacked = {("layer", "query"): Target(12, 16, (2,))}
  for targets in (looped, stacked):
    made = make_projections(
      targets, rank=4, seed=5, init="kaiming_uniform", sharing="unique"
    )
    assert digest(made) == GOLDEN["unique"]
  first, second = made["layer"]["query"]["A"]
  assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("golden", GOLDEN["peft"])
def test_pefts_own_matrices(golden):
  pair = make_pair(**golden["pair"], init="peft")
  for name in "AB":
    np.testing.assert_array_equal(pair[name].flatten()[:6], golden[name])
  assert digest(pair) == golden["digest"]


SPARSE = 2 / 700 * 700**0.5


# The bounds and the variance of (rank, inputs) = (300, 700) under fan-in.
@pytest.mark.parametrize(
  "init, low, high, mean, variance",
  [
    ("kaiming_uniform", -((6 / 700) ** 0.5), (6 / 700) ** 0.5, 0, 2 / 700),
    ("peft", -((6 / 700) ** 0.5), (6 / 700) ** 0.5, 0, 2 / 700),
    ("kaiming_normal", -np.inf, np.inf, 0, 2 / 700),
    ("uniform", 0, 0.1, 0.05, 0.01 / 12),
    ("orthogonal", -np.inf, np.inf, 0, 2 / 700),
    ("rademacher", -((2 / 700) ** 0.5), (2 / 700) ** 0.5, 0, 2 / 700),
    ("sparse_third", -((6 / 700) ** 0.5), (6 / 700) ** 0.5, 0, 2 / 700),
    ("sparse_root", -(SPARSE**0.5), SPARSE**0.5, 0, 2 / 700),
  ],
)
def test_distributions(init, low, high, mean, variance):
  A = np.asarray(make_pair(300, 700, 4, init=init)["A"])
  assert A.dtype == np.float32
  assert low * (1 + 1e-7) <= A.min() and A.max() <= high * (1 + 1e-7)
  if np.isfinite(high):
    assert A.max() > low + 0.999 * (high - low)
    assert A.min() < low + 0.001 * (high - low)
  np.testing.assert_allclose(
    A.mean(), mean, atol=5 * (variance / A.size) ** 0.5
  )
  np.testing.assert_allclose(A.var(), variance, rtol=0.02)


def test_b_has_the_rank_as_its_fan_in():
  pair = make_pair(24, 7, 5000)
  assert 0.99 * 0.5 < np.abs(pair["B"]).max() <= 0.5


@pytest.mark.parametrize("init, one_in", [("third", 3), ("root", 700**0.5)])
def test_sparse_entries(init, one_in):
  """The share of them, all of one size and of either sign alike."""
  A = np.asarray(make_pair(300, 700, 4, init=f"sparse_{init}")["A"])
  there = A[A != 0]
  spread = (A.size / one_in) ** 0.5
  assert abs(len(there) - A.size / one_in) < 5 * spread
  assert abs(np.sign(there).sum()) < 5 * spread
  assert len(set(np.abs(there))) == 1


@pytest.mark.parametrize("rank, rows", [(6, True), (40, False)])
def test_orthogonal_rows_or_columns(rank, rows):
  """Below and above the widths; the norm is Kaiming's expected one."""
  pair = make_pair(rank, 20, 30, init="orthogonal")
  A, B = np.asarray(pair["A"]), np.asarray(pair["B"])
  (A, B), least = ((A, B.T), rank) if rows else ((A.T, B), 20)
  close = {"rtol": 0, "atol": 2e-5}
  np.testing.assert_allclose(A @ A.T, 2 * rank / least * np.eye(least), **close)
  least = rank if rows else 30
  np.testing.assert_allclose(B @ B.T, 60 / least * np.eye(least), **close)


@pytest.mark.parametrize("init", ["kaiming_uniform", "uniform"])
def test_a_and_b_and_seeds_are_independent(init):
  one, other = (make_pair(40, 40, 40, seed=s, init=init) for s in (0, 1))
  draws = [one["A"], one["B"], other["A"], other["B"]]
  flat = np.stack([np.asarray(a).flatten() for a in draws])
  np.testing.assert_allclose(np.corrcoef(flat), np.eye(4), atol=0.1)


def test_one_pair_is_as_wide_as_the_widest_layers():
  """The widest in and the widest out may be two different layers."""
  targets = {("up",): Target(8, 32, (2,)), ("down",): Target(24, 4, (2,))}
  shared = make_projections(
    targets, rank=3, seed=0, init="kaiming_uniform", sharing="shared"
  )
  pair = make_pair(3, 24, 32)
  assert shared.keys() == {"A", "B"}
  for name, shape in {"A": (3, 24), "B": (32, 3)}.items():
    assert shared[name].shape == shape
    np.testing.assert_array_equal(shared[name], pair[name])


def test_a_pair_per_layer_has_each_layers_own_size():
  targets = {("a", "up"): Target(8, 32, (2,)), ("a", "down"): Target(24, 4)}
  made = make_projections(
    targets, rank=3, seed=0, init="kaiming_uniform", sharing="unique"
  )
  assert jax.tree.map(jnp.shape, made) == {
    "a": {
      "up": {"A": (2, 3, 8), "B": (2, 32, 3)},
      "down": {"A": (3, 24), "B": (4, 3)},
    }
  }
  assert np.abs(made["a"]["up"]["A"]).max() <= (6 / 8) ** 0.5


def test_the_digest_sees_every_bit_and_no_order():
  pair = make_pair(3, 4, 5)
  assert digest(pair) == digest({"B": pair["B"], "A": np.asarray(pair["A"])})
  nudged = np.nextafter(np.asarray(pair["A"]), np.float32(1))
  assert digest(pair) != digest({**pair, "A": nudged})


@pytest.mark.parametrize(
  "call, word",
  [
    (partial(make_pair, 3, 4, 5, init="zeros"), "choose from kaiming_uniform"),
    (partial(make_pair, 3, 4, 5, seed=-1, init="peft"), "32 bits; got -1"),
    (partial(make_pair, 3, 4, 5, seed=2**32, init="peft"), "32 bits"),
    (
      partial(
        make_projections,
        {("a",): Target(2, 2)},
        rank=1,
        seed=0,
        init="peft",
        sharing="unique",
      ),
      "never unique",
    ),
    (
      partial(
        make_projections,
        {("a",): Target(2, 2)},
        rank=1,
        seed=0,
        init="uniform",
        sharing="all",
      ),
      "shared or unique",
    ),
  ],
)
def test_wrong_settings_are_refused(call, word):
  with pytest.raises(UserError, match=word):
    call()
