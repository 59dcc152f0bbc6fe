"""Tied-LoRA: VeRA whose pair A, B is trained as well (arXiv 2311.09578).

  h = W0 x + b * (B (d * (A x)))

All layers share A (r x in_max) and B (out_max x r), and each has its own d (r)
and b (out), as in VeRA; a layer takes the leading columns of A and rows of B.
The pair starts as VeRA's does, by Kaiming, and b at 0, so that the first output
is the base's.

A pair that was trained on one task may be frozen for others:
`vera.init=stored` with `vera.pair=` the folder of this adapter.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Path,
  Site,
  as_they_are,
)
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.projections import check_entries, kaiming_uniform
from vera_jax.adapters.table import TiedLoraSettings as Settings
from vera_jax.adapters.table import tied_lora as tied_lora

A, B, D, B_VECTOR = (f"tied_lora_{letter}" for letter in ("A", "B", "d", "b"))


def make_tied_lora(s: Settings) -> Adapter:
  """Tied-LoRA as an `Adapter`: r + out numbers per site, and one pair."""

  def common(key: Array, sites: Mapping[Path, Site]) -> dict[str, Array]:
    inputs = max(site.inputs for site in sites.values())
    outputs = max(site.outputs for site in sites.values())
    check_entries(s.rank * (inputs + outputs), sites)
    return {
      A: kaiming_uniform(jax.random.fold_in(key, 0), (s.rank, inputs)),
      B: kaiming_uniform(jax.random.fold_in(key, 1), (outputs, s.rank)),
    }

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    return {
      D: jnp.full(s.rank, s.d_init, jnp.float32),
      B_VECTOR: jnp.zeros(site.outputs, jnp.float32),
    }

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    return LowRank(
      down=site.common[A][:, : site.inputs].T,
      up=site.common[B][: site.outputs].T,
      inner=leaves[D],
      outer=leaves[B_VECTOR],
      trains_down=True,
      trains_up=True,
    )

  return Adapter(
    name="tied_lora",
    common=common,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )
