"""LoRA (arXiv 2106.09685), the baseline: h = W0 x + (alpha / r) B A x.

Every site has matrices A (r x in) and B (out x r) of its own, both trained; A
starts as torch's `kaiming_uniform_(a=sqrt(5))`, B at 0. Rank-stabilised LoRA
(arXiv 2312.03732) has alpha / sqrt(r). LoRA-FA (arXiv 2308.03303) trains B
alone, and A stays where it started; here it comes from a seed of its own, so
that no file need hold it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Path,
  Site,
  Target,
  as_they_are,
)
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.projections import make_projections
from vera_jax.adapters.table import LoraSettings as Settings
from vera_jax.adapters.table import SeededLoraSettings as SeededSettings
from vera_jax.adapters.table import lora as lora
from vera_jax.adapters.table import lora_fa as lora_fa

A, B = "lora_A", "lora_B"
# What alpha is divided by, given the rank.
SCALES: dict[str, Callable[[int], float]] = {"rank": float, "root": math.sqrt}


def scale(s: Settings) -> float:
  """What multiplies the delta."""
  return s.alpha / SCALES[s.scaling](s.rank)


def make_lora(s: Settings) -> Adapter:
  """LoRA as an `Adapter`: r (in + out) trained numbers per site."""

  def start(key: Array, site: Site) -> dict[str, Array]:
    bound = site.inputs**-0.5
    shape = s.rank, site.inputs
    first = jax.random.uniform(
      key, shape, jnp.float32, minval=-bound, maxval=bound
    )
    return {A: first, B: jnp.zeros((site.outputs, s.rank), jnp.float32)}

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    up = scale(s) * leaves[B].T
    return LowRank(down=leaves[A].T, up=up, trains_down=True, trains_up=True)

  return Adapter(
    name="lora",
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )


def make_lora_fa(s: SeededSettings) -> Adapter:
  """LoRA-FA as an `Adapter`: r out trained numbers per site."""

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    """A of every site, with the variance that LoRA's starts with."""
    pairs = make_projections(
      sites,
      rank=s.rank,
      seed=s.projection_seed,
      init="kaiming_uniform",
      sharing="unique",
    )
    flat = flatten_dict(pairs)
    return unflatten_dict(
      {p: x * np.float32(6**-0.5) for p, x in flat.items() if p[-1] == "A"}
    )

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    return {B: jnp.zeros((site.outputs, s.rank), jnp.float32)}

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    up = scale(s) * leaves[B].T
    return LowRank(down=site.shared["A"].T, up=up, trains_up=True)

  return Adapter(
    name="lora",
    shared=shared,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )
