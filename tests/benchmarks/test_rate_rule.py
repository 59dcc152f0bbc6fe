"""The rule for the rate: what a step does, the predictions, the best rate."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rate_rows, rate_rule
from configs.sweeps.rate_rule import FACTORS, PREDICTED
from vera_jax import lora, vera
from vera_jax.adapters.interface import Site
from vera_jax.adapters.lora import Settings as lora_settings
from vera_jax.adapters.methods import METHODS
from vera_jax.adapters.projections import make_pair
from vera_jax.adapters.rate_rule import distance

WIDE = 1536  # the feed-forward layer of all three networks
SHAPES = {
  "minilm": (6, 384, 5),
  "dinov2": (12, 384, 5),
  "smollm2": (30, 576, 6),
}


def inputs_of(network, layers):
  """Of each adapted layer; the last feed-forward layer has the widest."""
  blocks, width, narrow = SHAPES[network]
  return blocks * ([width] * 2 if layers == "qv" else [width] * narrow + [WIDE])


@pytest.mark.parametrize("network", PREDICTED)
def test_the_predictions_are_the_rules(network):
  for (method, rank, size, layers), predicted in PREDICTED[network].items():
    inputs = inputs_of(network, layers)
    if method == "vera":
      far = distance(size, [i / max(inputs) for i in inputs])
    else:
      settings = lora_settings(rank=rank, alpha=size)
      far = METHODS[method].distance(settings, inputs)
    made = rate_rule.rate(far, rate_rule.STEPS)
    assert float(f"{made:.3g}") == pytest.approx(predicted, rel=5e-3)


@pytest.mark.parametrize("rank, widest", [(16, 96), (256, 96), (256, 384)])
def test_the_size_of_veras_first_step(rank, widest):
  """2 rate d_init size(x) sqrt(i / I), whatever the rank."""
  rate, i, o = 0.01, 96, 4000
  adapter = vera(rank, d_init=0.3)
  pair = make_pair(rank, widest, o, seed=1, init="kaiming_uniform")
  site = Site(("layer",), i, o, lambda: jnp.zeros((i, o)), shared=pair)
  leaves = adapter.init(jax.random.key(0), site)
  assert not leaves["vera_b"].any()
  signs = np.random.default_rng(0).choice([-1.0, 1.0], o)
  leaves["vera_b"] = jnp.float32(rate * signs)
  x = jnp.float32(np.random.default_rng(1).normal(size=(400, i)))
  change = adapter.product(leaves, site, x)
  expected = 2 * rate * 0.3 * math.sqrt(i / widest)
  assert float(jnp.sqrt((change**2).mean())) == pytest.approx(
    expected, rel=0.15
  )


@pytest.mark.parametrize("rank", [4, 64])
def test_what_loras_first_step_wins(rank):
  """sqrt(2 / pi) rate alpha |g| / sqrt(3 i) for each output, whatever r is."""
  rate, alpha, i, o = 0.01, 16.0, 96, 2000
  adapter = lora(rank, alpha=alpha)
  site = Site(("layer",), i, o, lambda: jnp.zeros((i, o)))
  leaves = adapter.init(jax.random.key(0), site)
  assert not leaves["lora_B"].any()
  gradient = jnp.float32(np.random.default_rng(0).normal(size=(i, o)))

  def loss(leaves):
    return (adapter.weights(leaves, site)[0] * gradient).sum()

  slope = jax.grad(loss)(leaves)["lora_B"]
  won = rate * float(jnp.abs(slope).sum())
  lengths = float(jnp.linalg.norm(gradient, axis=0).sum())
  expected = math.sqrt(2 / math.pi) * rate * alpha / math.sqrt(3 * i) * lengths
  assert won == pytest.approx(expected, rel=0.15)


def test_a_parabola_has_its_best_rate():
  noise = iter([0.001, -0.001] * 5)
  losses = {
    0.02 * f: [
      0.5 + 0.1 * (math.log2(f) - 0.4) ** 2 + next(noise) for _ in "ab"
    ]
    for f in FACTORS
  }
  best = rate_rule.best_rate(losses)
  assert best.rate == pytest.approx(0.02 * 2**0.4, rel=1e-3)
  assert best.low < best.rate < best.high < 0.04
  assert rate_rule.holds(0.02, best) and not rate_rule.holds(0.06, best)


def test_an_end_of_the_rates_is_no_best_one():
  losses = {f: [1 - f / 8, 1.01 - f / 8] for f in FACTORS}
  best = rate_rule.best_rate(losses)
  assert (best.rate, best.inside) == (4.0, False)
  assert not rate_rule.holds(4.0, best)
  # nor does a rate that diverged spoil the others
  diverged = {**losses, 4.0: [math.inf, 0.4]}
  assert rate_rule.best_rate(diverged).rate == 2.0


def test_unfinished_settings_are_left_out(tmp_path):
  folder = tmp_path / "minilm/runs/one"
  folder.mkdir(parents=True)
  group = {"rank": 16, "d_init": 0.1, "targets": ["query", "value"]}
  result = {
    "method": "vera",
    "score_name": "label_probability",
    "last": {"score": 0.5},
    "learning_rates": {"adapter_lr": 0.0286},
    "config": {"vera": group},
  }
  (folder / "result.json").write_text(json.dumps(result))
  setting = "minilm", "vera", 16, 0.1, "qv"
  assert rate_rule.setting_of("minilm", result) == setting
  assert rate_rule.loss_of(result) == pytest.approx(math.log(2))
  assert not [*rate_rule.outcomes(tmp_path)]
  assert "No setting" in rate_rule.markdown(tmp_path)


def test_its_rows_are_no_other_studies():
  """Neither by data.subset_seed 0 of the file nor of what held_out leaves."""
  rows = 67_349
  unused = {*rate_rows.unused_rows(rows).tolist()}
  order = np.random.default_rng(0).permutation(rows)
  left = np.sort(order[2072:])
  again = left[np.random.default_rng(0).permutation(len(left))]
  assert not unused & {*order[:25_600].tolist(), *again[:25_600].tolist()}
  assert len(unused) > 2400 + 800 + 1200 + 400
