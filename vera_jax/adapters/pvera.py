"""PVeRA: VeRA whose inner activations are drawn in training (arXiv 2512.07703).

  mu, log_variance = the halves of d * (A x)
  z = mu + noise * exp(log_variance / 2)     in training, for every token anew
  z = mu                                     otherwise
  h = W0 x + b * (B z)

A (2r x in_max) and B (out_max x r) are one frozen random pair for the network.
Without a key this is VeRA by the first r rows of A, which is what is merged.
The authors' code adds a Kullback-Leibler term of weight 1e-6 down to 1e-16, a
choice per data set, and multiplies the delta by 16; PEFT has neither, and
neither have we.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Path,
  Site,
  Target,
  as_they_are,
)
from vera_jax.adapters.products import Forward, add_low_rank, scaled
from vera_jax.adapters.projections import make_projections, pair_of
from vera_jax.adapters.table import PairSettings as Settings
from vera_jax.adapters.table import pvera as pvera

D, B_VECTOR = "pvera_d", "pvera_b"


def make_pvera(s: Settings) -> Adapter:
  """PVeRA as an `Adapter`: 2r + out trained numbers per site."""
  rank = s.rank

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    return make_projections(
      sites, rank=rank, rows=2 * rank, seed=s.projection_seed, init=s.init
    )

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    return {
      D: jnp.full(2 * rank, s.d_init, jnp.float32),
      B_VECTOR: jnp.zeros(site.outputs, jnp.float32),
    }

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    down, up = pair_of(site, rows=rank)
    return LowRank(down, up, inner=leaves[D][:rank], outer=leaves[B_VECTOR])

  def forward(
    leaves: Leaves,
    site: Site,
    x: Array,
    key: PRNGKeyArray | None,
    inner: Forward,
  ) -> tuple[Array, None]:
    y = inner(x)
    down, up = (matrix.astype(y.dtype) for matrix in pair_of(site))
    both = scaled(site.project(x, down), leaves[D])
    z, log_variance = jnp.split(both, 2, axis=-1)
    if key is not None:
      noise = jax.random.normal(key, z.shape, z.dtype)
      z += noise * jnp.exp(log_variance / 2)
    return y + scaled(z @ up, leaves[B_VECTOR]), None

  return Adapter(
    name="pvera",
    shared=shared,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    forward=forward,
    prepare=as_they_are,
  )
