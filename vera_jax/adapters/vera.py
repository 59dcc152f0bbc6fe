"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

  h = W0 x + b * (B (d * (A x)))                                  (equation 2)

A (r x in_max) and B (out_max x r) are one frozen random pair for the whole
network; a site takes the leading columns of A and rows of B that it needs.
d (r) and b (out) are all that is trained. There is no alpha.

A convolution's kernel is one matrix, (taps in) x out, where a tap is a position
of its window: the whole of it has one d. By taps, each position has a d of its
own and all have the same A, as narrow as that of a 1 x 1 layer.

`products.py` has the orders in which this is multiplied out.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
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
from vera_jax.adapters.projections import (
  check_choices,
  make_projections,
  pair_of,
)
from vera_jax.adapters.structured import as_array
from vera_jax.errors import UserError

D, B_VECTOR = "vera_d", "vera_b"


def vera(
  rank: int = 256,
  *,
  d_init: float = 0.1,
  init: str = "kaiming_uniform",
  projection_seed: int = 0,
  train: str = "both",
  sharing: str = "shared",
  conv: str = "whole",
) -> Adapter:
  """VeRA as an `Adapter`: r + out trained numbers per site.

  Args:
    rank: r; may exceed the layers' widths (section 3.1).
    d_init: the value that every entry of d starts from; b starts at 0.
    init: how A and B are drawn, a name in `projections.INITIALISERS`.
    projection_seed: the seed A and B come from.
    train: "both" vectors, or only "d" or only "b" (Table 6). A vector that is
      not trained is not there: b counts as 1 and d, trained alone, starts at 0;
      d counts as `d_init`.
    sharing: "shared", one pair for all sites, or "unique", one per site
      (Table 7).
    conv: how a convolution's kernel is adapted: "whole", or by "taps", with
      taps * r + out trained numbers.

  Raises:
    UserError: a value that is out of range or no name of a choice.
  """
  if rank < 1:
    raise UserError(f"VeRA's rank is {rank}; it must be at least 1.")
  if train not in ("both", "d", "b"):
    raise UserError(f"train is {train!r}; choose both, d or b.")
  if conv not in ("whole", "taps"):
    raise UserError(f"conv is {conv!r}; choose whole or taps.")
  check_choices(seed=projection_seed, init=init, sharing=sharing)

  def taps(site: Target | Site) -> int:
    return site.view.taps if conv == "taps" else 1

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    of_a_tap = {
      path: site._replace(inputs=site.inputs // taps(site))
      for path, site in sites.items()
    }
    return make_projections(
      of_a_tap, rank=rank, seed=projection_seed, init=init, sharing=sharing
    )

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    first = 0.0 if train == "d" else d_init
    d = jnp.full(taps(site) * rank, first, jnp.float32)
    b = jnp.zeros(site.outputs, jnp.float32)
    return {"both": {D: d, B_VECTOR: b}, "d": {D: d}, "b": {B_VECTOR: b}}[train]

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    number = taps(site)
    b = leaves.get(B_VECTOR)
    d = leaves[D] if D in leaves else jnp.full(rank, d_init, jnp.float32)
    down, up = pair_of(site._replace(inputs=site.inputs // number))
    if number == 1:
      return LowRank(down, up, inner=d, outer=b)
    down = jnp.tile(as_array(down, jnp.float32), (number, 1))
    if D not in leaves:
      return LowRank(down, up, inner=d, outer=b)
    by_tap = jnp.repeat(d.reshape(number, rank), site.inputs // number, axis=0)
    return LowRank(down * by_tap, up, outer=b, trains_down=True)

  return Adapter(
    name="vera",
    shared=shared,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )


def onelora() -> Adapter:
  """1LoRA (arXiv 2503.08333): h = W0 x + b * sum(x), out numbers per site.

  It is VeRA of rank 1 with matrices of ones, of which b is trained alone.
  """
  return vera(1, d_init=1.0, init="ones", train="b")
