"""Schedule, rates by label, clipping, and no slot for a frozen leaf."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import rte
from vera_jax.adapters.labels import ADAPTER, FROZEN, HEAD, label_tree, split
from vera_jax.errors import UserError
from vera_jax.train.optim import Extent, optimiser, rates_at, schedule

PARAMS = {
  "encoder": {
    "query": {
      "kernel": jnp.ones((40, 40)),
      "vera_d": jnp.ones(5),
      "vera_b": jnp.ones(7),
    }
  },
  "classifier": {"kernel": jnp.ones((3, 2))},
}
LABELS = label_tree(PARAMS, "vera")
RATES = {"adapter_lr": 0.01, "head_lr": 0.002}


def linear_with_warmup(step, warmup, total):
  """transformers' get_linear_schedule_with_warmup, as a factor of the peak."""
  if step < warmup:
    return step / max(1, warmup)
  return max(0.0, (total - step) / max(1, total - warmup))


@pytest.mark.parametrize(
  "steps, ratio, warmup",
  [(100, 0.06, 6), (50, 0.0, 0), (20, 0.5, 10), (1, 0, 0)],
)
def test_the_schedule_is_transformers(steps, ratio, warmup):
  rate = schedule(0.3, steps=steps, warmup_ratio=ratio)
  got = [float(rate(step)) for step in range(steps + 1)]
  want = [
    0.3 * linear_with_warmup(step, warmup, steps) for step in range(steps + 1)
  ]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
  assert got[-1] == 0 and (got[0] == 0) == (warmup > 0)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_the_rates_that_are_logged_are_the_schedules(ratio, decay):
  config = rte.get_config()
  config.optim.warmup_ratio, config.optim.schedule = ratio, decay
  config.optim.adapter_lr, config.optim.head_lr = 0.3, 0.1
  rate = schedule(0.3, steps=30, warmup_ratio=ratio, decay=decay)
  for step in (1, 2, 3, 4, 15, 30):  # optax counts from 0
    rates = rates_at(step, config, extent=Extent((), 30))
    assert rates["adapter_lr"] == pytest.approx(float(rate(step - 1)), abs=1e-7)
    assert rates["head_lr"] == pytest.approx(rates["adapter_lr"] / 3)


def test_the_schedule_may_fall_like_a_cosine():
  """transformers' get_cosine_schedule_with_warmup."""
  rate = schedule(0.3, steps=50, warmup_ratio=0.1, decay="cosine")
  want = [0.3 * step / 5 for step in range(5)]
  want += [0.15 * (1 + math.cos(math.pi * step / 45)) for step in range(46)]
  got = [float(rate(step)) for step in range(51)]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
  with pytest.raises(UserError, match="optim.schedule is 'flat'; choose line"):
    schedule(0.3, steps=50, warmup_ratio=0.1, decay="flat")


def updates_of(tx, grads, count=1):
  """The updates of `count` steps over the same gradients."""
  params = split(PARAMS, LABELS)[0]
  state, made = tx.init(params), []
  for _ in range(count):
    updates, state = tx.update(grads, state, params)
    made.append(updates)
  return made


def gradients(scale=1.0):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      scale * rng.choice([-2.0, 0.5], leaf.shape), jnp.float32
    ),
    split(PARAMS, LABELS)[0],
  )


@pytest.mark.smoke
def test_adapter_and_head_have_rates_of_their_own():
  """AdamW's first update is the rate against the gradient's sign."""
  labels = split(LABELS, LABELS)[0]
  tx = optimiser(labels, **RATES, steps=10, warmup_ratio=0.0)
  grads = gradients()
  (updates,) = updates_of(tx, grads)
  peak = {"encoder": 0.01, "classifier": 0.002}
  for name, rate in peak.items():
    want = jax.tree.map(lambda g, rate=rate: -rate * jnp.sign(g), grads[name])
    for got, expected in zip(
      jax.tree.leaves(updates[name]), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_weight_decay_reaches_trainable_leaves():
  labels = split(LABELS, LABELS)[0]
  tx = optimiser(labels, **RATES, steps=10, warmup_ratio=0.0, weight_decay=0.5)
  grads = jax.tree.map(jnp.zeros_like, split(PARAMS, LABELS)[0])
  (updates,) = updates_of(tx, grads)
  query = updates["encoder"]["query"]["vera_b"]
  np.testing.assert_allclose(query, -0.01 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(
    updates["classifier"]["kernel"], -0.002 * 0.5, rtol=1e-5
  )


def size_in_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("whole", [False, True])
def test_a_frozen_leaf_has_no_slot(whole):
  """Two moments for each trained number, and counters; given it or not."""
  trainable, _ = split(PARAMS, LABELS)
  labels = LABELS if whole else split(LABELS, LABELS)[0]
  params = PARAMS if whole else trainable
  state = optimiser(labels, **RATES, steps=10).init(params)
  counters = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state))
  want = 2 * 4 * (5 + 7 + 3 * 2) + 4 * counters
  assert size_in_bytes(state) == want
  assert counters <= 4
  assert {ADAPTER, HEAD, FROZEN} == set(jax.tree.leaves(LABELS))


def test_clipping_is_by_the_norm_over_adapter_and_head():
  """A linear rule in the optimiser's place shows what it is given."""
  labels = split(LABELS, LABELS)[0]
  settings = {**RATES, "steps": 10, "warmup_ratio": 0.0}
  clipped = optimiser(labels, **settings, grad_clip=1.0)
  plain = optimiser(labels, **settings)
  one, two = gradients(), gradients(30.0)
  norm = optax.tree.norm(one)
  unit = jax.tree.map(lambda g: g / norm, one)

  def run(tx, steps):
    params = split(PARAMS, LABELS)[0]
    state = tx.init(params)
    for grads in steps:
      updates, state = tx.update(grads, state, params)
    return updates

  # Adam forgets a gradient's scale, not the ratio of two steps' scales.
  small = jax.tree.map(lambda g: 0.1 * g, unit)
  got = run(clipped, [two, small])
  want = run(plain, [unit, small])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  loose = run(plain, [two, small])
  gap = jnp.abs(loose["classifier"]["kernel"] - got["classifier"]["kernel"])
  assert gap.max() > 1e-5


def test_each_run_of_an_ensemble_may_have_numbers_of_its_own():
  """Traced, with an axis of runs, it gives the update that it gives alone."""
  labels = {"layer": {"vera_b": "adapter"}, "classifier": {"kernel": "head"}}
  params = {
    "layer": {"vera_b": jnp.array([1.0, -2.0])},
    "classifier": {"kernel": jnp.array([[3.0]])},
  }
  grads = jax.tree.map(lambda x: 0.3 * x + 1, params)

  def update(rates):
    tx = optimiser(labels, **rates, steps=10, warmup_ratio=0.0)
    return tx.update(grads, tx.init(params), params)[0]

  rates = {
    "adapter_lr": jnp.array([0.0, 0.03, 0.5]),
    "head_lr": jnp.array([0.002, 0.0, 0.3]),
    "weight_decay": jnp.array([0.5, 0.1, 0.0]),
  }
  got = jax.vmap(update)(rates)
  for i in range(3):
    want = update({name: float(many[i]) for name, many in rates.items()})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-8)


def test_epsilon_is_added_to_a_gradients_size():
  """Adam's first step is g / (|g| + epsilon)."""
  labels, grads = split(LABELS, LABELS)[0], gradients()
  tx = optimiser(labels, **RATES, steps=10, warmup_ratio=0.0, eps=1.0)
  (updates,) = updates_of(tx, grads)
  found = updates["encoder"]["query"]["vera_b"]
  grad = np.asarray(grads["encoder"]["query"]["vera_b"])
  expected = -RATES["adapter_lr"] * grad / (np.abs(grad) + 1.0)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
