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
from vera_jax.errors import UserError

A, B = "lora_A", "lora_B"
# What alpha is divided by, given the rank.
SCALES: dict[str, Callable[[int], float]] = {"rank": float, "root": math.sqrt}


def lora(
  rank: int = 8,
  *,
  alpha: float = 8.0,
  scaling: str = "rank",
  train: str = "both",
  projection_seed: int = 0,
) -> Adapter:
  """LoRA as an `Adapter`: r (in + out) trained numbers per site.

  Args:
    rank: r.
    alpha: over what `scaling` says, the delta's scale.
    scaling: "rank", or "root" for the rank-stabilised sqrt(r).
    train: "both" matrices, or "B" alone: r out numbers per site.
    projection_seed: of A, where it is not trained.

  Raises:
    UserError: a rank below 1, or a value that is no name of a choice.
  """
  if rank < 1:
    raise UserError(f"LoRA's rank is {rank}; it must be at least 1.")
  if scaling not in SCALES:
    raise UserError(f"scaling is {scaling!r}; choose {' or '.join(SCALES)}.")
  if train not in ("both", "B"):
    raise UserError(f"train is {train!r}; choose both or B.")

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    """A of every site, with the variance that LoRA's starts with."""
    pairs = make_projections(
      sites,
      rank=rank,
      seed=projection_seed,
      init="kaiming_uniform",
      sharing="unique",
    )
    flat = flatten_dict(pairs)
    return unflatten_dict(
      {p: x * np.float32(6**-0.5) for p, x in flat.items() if p[-1] == "A"}
    )

  def start(key: Array, site: Site) -> dict[str, Array]:
    bound = site.inputs**-0.5
    shape = rank, site.inputs
    first = jax.random.uniform(
      key, shape, jnp.float32, minval=-bound, maxval=bound
    )
    zeros = jnp.zeros((site.outputs, rank), jnp.float32)
    return {A: first, B: zeros} if train == "both" else {B: zeros}

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    up = (alpha / SCALES[scaling](rank)) * leaves[B].T
    if train == "both":
      return LowRank(down=leaves[A].T, up=up, trains_down=True, trains_up=True)
    return LowRank(down=site.shared["A"].T, up=up, trains_up=True)

  return Adapter(
    name="lora",
    shared=shared if train == "B" else None,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )


def lora_fa(
  rank: int = 8,
  *,
  alpha: float = 8.0,
  scaling: str = "rank",
  projection_seed: int = 0,
) -> Adapter:
  """LoRA-FA: LoRA whose A stays as it is drawn, r out numbers per site.

  The arguments are those of `lora`.
  """
  return lora(
    rank,
    alpha=alpha,
    scaling=scaling,
    train="B",
    projection_seed=projection_seed,
  )
