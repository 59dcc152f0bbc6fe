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
from dataclasses import KW_ONLY, dataclass
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
from vera_jax.adapters.method import QUERY_VALUE, Method, NoSettings, setting
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.projections import (
  INITIALISERS,
  STORED,
  check_choices,
  make_projections,
  pair_of,
)
from vera_jax.adapters.structured import as_array

D, B_VECTOR = "vera_d", "vera_b"


@dataclass(frozen=True)
class Settings:
  rank: int = setting(256, "r; may exceed the layers' widths", least=1)
  _: KW_ONLY
  d_init: float = setting(
    0.1, "the value that every entry of d starts from; b starts at 0"
  )
  init: str = setting(
    "kaiming_uniform", "how A and B are drawn", choices=(*INITIALISERS, STORED)
  )
  projection_seed: int = setting(0, "the seed of A and B", least=0)
  train: str = setting(
    "both",
    "the trained vectors (Table 6); where b isn't, it counts as 1 and d starts"
    " at 0; where d isn't, it stays at d_init",
    choices=("both", "d", "b"),
  )
  sharing: str = setting(
    "shared",
    "one pair A, B for all layers, or one per layer (Table 7)",
    choices=("shared", "unique"),
  )
  conv: str = setting(
    "whole",
    "how a convolution's kernel is adapted: with r + out numbers, or with"
    " taps * r + out",
    choices=("whole", "taps"),
  )


def make_vera(s: Settings) -> Adapter:
  """VeRA as an `Adapter`: r + out trained numbers per site."""
  check_choices(seed=s.projection_seed, init=s.init, sharing=s.sharing)

  def taps(site: Target | Site) -> int:
    return site.view.taps if s.conv == "taps" else 1

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    of_a_tap = {
      path: site._replace(inputs=site.inputs // taps(site))
      for path, site in sites.items()
    }
    return make_projections(
      of_a_tap,
      rank=s.rank,
      seed=s.projection_seed,
      init=s.init,
      sharing=s.sharing,
    )

  def start(key: Array, site: Site) -> dict[str, Array]:
    del key
    first = 0.0 if s.train == "d" else s.d_init
    d = jnp.full(taps(site) * s.rank, first, jnp.float32)
    b = jnp.zeros(site.outputs, jnp.float32)
    return {"both": {D: d, B_VECTOR: b}, "d": {D: d}, "b": {B_VECTOR: b}}[
      s.train
    ]

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    number = taps(site)
    b = leaves.get(B_VECTOR)
    d = leaves[D] if D in leaves else jnp.full(s.rank, s.d_init, jnp.float32)
    down, up = pair_of(site._replace(inputs=site.inputs // number))
    if number == 1:
      return LowRank(down, up, inner=d, outer=b)
    down = jnp.tile(as_array(down, jnp.float32), (number, 1))
    if D not in leaves:
      return LowRank(down, up, inner=d, outer=b)
    by_tap = jnp.repeat(
      d.reshape(number, s.rank), site.inputs // number, axis=0
    )
    return LowRank(down * by_tap, up, outer=b, trains_down=True)

  return Adapter(
    name="vera",
    shared=shared,
    init=start,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )


vera = Method(
  "vera",
  make_vera,
  Settings,
  config=dict(targets=QUERY_VALUE, lr=None, head_lr=None),
  # where b is trained alone, d stays at d_init, a constant of the program
  starts=lambda s: (
    ("init", "projection_seed")
    if s.train == "b"
    else ("d_init", "init", "projection_seed")
  ),
  per_run=lambda s: ("d_init",) if s.train == "both" else (),
)


def make_onelora(s: NoSettings) -> Adapter:
  """1LoRA (arXiv 2503.08333): h = W0 x + b * sum(x), out numbers per site.

  It is VeRA of rank 1 with matrices of ones, of which b is trained alone.
  """
  del s
  return vera(1, d_init=1.0, init="ones", train="b")


onelora = Method(
  "onelora",
  make_onelora,
  NoSettings,
  config=dict(targets=QUERY_VALUE, lr=4e-4, head_lr=4e-3),
)
