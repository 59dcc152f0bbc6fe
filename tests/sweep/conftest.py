"""Sweeps of the tiny model."""

import pytest

from configs.sweeps import cross, product, seeds, sweep
from vera_jax.sweep.plan import make_plan


@pytest.fixture
def tiny_sweep(tiny_config, tmp_path):
  """Makes a plan; the default is VeRA at two ranks, and LoRA, two seeds."""

  def make(overrides=None, *, fixed=(), folder=tmp_path, **changes):
    if overrides is None:
      vera = product({"method": ("vera",), "vera.rank": (2, 8)})
      overrides = cross(vera + product({"method": ("lora",)}), seeds((0, 1)))
    base = tiny_config(**{"optim__epochs": 1, **changes})
    return make_plan(sweep("Tiny", base, overrides), folder, fixed=fixed)

  return make
