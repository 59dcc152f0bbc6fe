"""RandLoRA: a full-rank sum of scaled random matrices (arXiv 2502.00987).

  h = W0 x + alpha / r * sum_j B_j diag(lambda_j) A diag(gamma_j) x

with j from 1 to n = ceil(min / r), where min and max are the smaller and the
larger of a layer's two widths. A (r x min) and the B_j (max x r) are random,
frozen and the same for all layers, which take the columns and rows that they
need. Where a layer has more inputs than outputs, the sum is transposed. The
n r entries of the lambdas and the n min of the gammas are trained. A and B have
variance 1.

We pair B's columns and lambda's entries as PEFT does: entry (p, j) of lambda
goes with column p n + j of all B_j side by side, not with column p of B_j. The
columns are random numbers, so that this is the same method.

Its delta has the size of W0 and no small form per row, so a bank refuses it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Path,
  Site,
  Target,
)
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.projections import (
  PRNG,
  check_entries,
  peft_bases,
  signed_uniform,
)
from vera_jax.adapters.table import RandloraSettings as Settings
from vera_jax.adapters.table import randlora as randlora

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"


def make_randlora(s: Settings) -> Adapter:
  """RandLoRA as an `Adapter`: n (r + min) trained numbers per site."""
  rank = s.rank

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    """A (r, min) and the B_j side by side, (max, n r), of the widest sites."""
    widest = (
      max(site.inputs for site in sites.values()),
      max(site.outputs for site in sites.values()),
    )
    matrices, fewer = math.ceil(min(widest) / rank), min(widest)
    check_entries(rank * (fewer + max(widest) * matrices), sites)
    if s.init == "peft":
      return peft_bases(s.projection_seed, rank, fewer, max(widest), matrices)
    key = jax.random.key(s.projection_seed, impl=PRNG)
    unit = np.float32(np.sqrt(3) * 2.0**-24)  # of variance 1
    shapes = {"A": (rank, fewer), "B": (max(widest), matrices * rank)}
    return {
      name: signed_uniform(jax.random.fold_in(key, fold), shape) * unit
      for fold, (name, shape) in enumerate(shapes.items())
    }

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    fewer = min(site.inputs, site.outputs)
    matrices = math.ceil(fewer / rank)
    return {
      LAMBDA: jnp.zeros((rank, matrices), jnp.float32),
      GAMMA: jnp.full((matrices, fewer), 1 / max(matrices, fewer), jnp.float32),
    }

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    fewer = min(site.inputs, site.outputs)
    A = site.shared["A"][:, None, :fewer]
    trained = leaves[LAMBDA][:, :, None] * A * leaves[GAMMA][None]
    trained = s.alpha / rank * trained.reshape(-1, fewer)
    fixed = site.shared["B"][: max(site.inputs, site.outputs), : len(trained)]
    if site.inputs <= site.outputs:
      return LowRank(down=trained.T, up=fixed.T, trains_down=True)
    return LowRank(down=fixed, up=trained, trains_up=True)

  return Adapter(
    name="randlora",
    shared=shared,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
  )
