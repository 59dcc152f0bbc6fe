"""LoRA (arXiv 2106.09685), the baseline: h = W0 x + (alpha / r) B A x.

Every site has matrices A (r x in) and B (out x r) of its own, both trained; A
starts as torch's `kaiming_uniform_(a=sqrt(5))`, B at 0.
"""

import jax
import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Site,
  as_they_are,
)
from vera_jax.adapters.products import add_low_rank
from vera_jax.errors import UserError

A, B = "lora_A", "lora_B"


def lora(rank: int = 8, *, alpha: float = 8.0) -> Adapter:
  """LoRA as an `Adapter`: r (in + out) trained numbers per site.

  The delta is scaled by alpha / rank.

  Raises:
    UserError: a rank below 1.
  """
  if rank < 1:
    raise UserError(f"LoRA's rank is {rank}; it must be at least 1.")

  def start(key: Array, site: Site) -> dict[str, Array]:
    bound = site.inputs**-0.5
    shape = rank, site.inputs
    return {
      A: jax.random.uniform(
        key, shape, jnp.float32, minval=-bound, maxval=bound
      ),
      B: jnp.zeros((site.outputs, rank), jnp.float32),
    }

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    del site
    up = (alpha / rank) * leaves[B].T
    return LowRank(down=leaves[A].T, up=up, trains_down=True)

  return Adapter(
    name="lora",
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )
