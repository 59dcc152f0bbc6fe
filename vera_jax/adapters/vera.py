"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

  h = W0 x + b * (B (d * (A x)))                                  (equation 2)

A (r x in_max) and B (out_max x r) are one frozen random pair for the whole
network; a site takes the leading columns of A and rows of B that it needs.
d (r) and b (out) are all that is trained. There is no alpha.

A convolution's kernel is one matrix, (taps in) x out, where a tap is a position
of its window: the whole of it has one d. By taps, each position has a d of its
own and all have the same A, as narrow as that of a 1 x 1 layer.

What a layer returns is y + b * ((d * (x @ A.T)) @ B.T), with y = x @ W0 + bias
(`product` below), or x times the kernel that has the delta in it (`weights`),
whichever is cheaper: `products.py` has the orders of multiplication.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  LowRank,
  Matrix,
  Path,
  Site,
  Target,
  as_they_are,
)
from vera_jax.adapters.method import NoSettings
from vera_jax.adapters.products import scaled
from vera_jax.adapters.projections import (
  STORED,
  check_choices,
  make_projections,
  pair_of,
)
from vera_jax.adapters.stored_pair import read_pair
from vera_jax.adapters.structured import as_array
from vera_jax.adapters.table import VeraSettings as Settings
from vera_jax.adapters.table import onelora as onelora
from vera_jax.adapters.table import vera
from vera_jax.errors import UserError
from vera_jax.operations.precision import exact

D, B_VECTOR = "vera_d", "vera_b"


def taps(s: Settings, site: Target | Site) -> int:
  """The blocks of inputs that have a d each: 1, but for a window by taps."""
  return site.view.taps if s.conv == "taps" else 1


def parts(
  s: Settings, leaves: Leaves, site: Site
) -> tuple[Matrix, Matrix, Array, Array]:
  """A (r, i), B (o, r), d (r) and b (o) of a site."""
  number = taps(s, site)
  A, B = (x.T for x in pair_of(site._replace(inputs=site.inputs // number)))
  d = leaves[D] if D in leaves else jnp.full(s.rank, s.d_init, jnp.float32)
  b = leaves[B_VECTOR] if B_VECTOR in leaves else jnp.ones(site.outputs)
  if number > 1:  # the window's positions side by side, each A with its d
    A = jnp.tile(as_array(A, jnp.float32), number)
    if D in leaves:
      A *= jnp.repeat(d.reshape(number, s.rank).T, len(A.T) // number, axis=1)
      d = jnp.ones(s.rank)
  return A, B, d, b


def make_vera(s: Settings) -> Adapter:
  """VeRA as an `Adapter`: r + out trained numbers per site."""
  check_choices(seed=s.projection_seed, init=s.init, sharing=s.sharing)
  if s.init == STORED and s.sharing == "unique":
    raise UserError("A stored pair is one for all layers: set sharing=shared.")
  if s.pair and s.init != STORED:
    raise UserError(
      f"The pair is to be that of {s.pair}, but init is {s.init!r}: set"
      " init=stored."
    )

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    if s.init == STORED:
      return dict(read_pair(s.pair, sites, rank=s.rank))
    of_a_tap = {
      path: site._replace(inputs=site.inputs // taps(s, site))
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
    d = {D: jnp.full(taps(s, site) * s.rank, first, jnp.float32)}
    b = {B_VECTOR: jnp.zeros(site.outputs, jnp.float32)}
    return {"both": d | b, "d": d, "b": b}[s.train]

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    """The definition: the kernel (i, o) that x is multiplied with, and bias."""
    A, B, d, b = parts(s, leaves, site)
    B = as_array(B, jnp.float32)
    with exact():
      delta = A.T @ (d[:, None] * (B.T * b[None]))
    return site.kernel().astype(jnp.float32) + delta, site.bias

  def product(leaves: Leaves, site: Site, x: Array) -> Array:
    """The same for few rows, without a kernel: b * ((d * (x @ A.T)) @ B.T)."""
    A, B, d, b = parts(s, leaves, site)
    thin = site.project(x, A.T.astype(site.dtype))  # x @ A.T, (*t, r)
    return scaled(scaled(thin, d) @ B.T.astype(site.dtype), b)

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    """Its factors, for the plans that fold them into the kernel."""
    A, B, d, b = parts(s, leaves, site)
    by_tap = taps(s, site) > 1 and D in leaves
    return LowRank(A.T, B.T, inner=d, outer=b, trains_down=by_tap)

  return Adapter(
    name="vera",
    shared=shared,
    init=start,
    weights=weights,
    product=product,
    low_rank=low_rank,
    prepare=as_they_are,
  )


def make_onelora(s: NoSettings) -> Adapter:
  """1LoRA (arXiv 2503.08333): h = W0 x + b * sum(x), out numbers per site.

  It is VeRA of rank 1 with matrices of ones, of which b is trained alone.
  """
  del s
  return vera(1, d_init=1.0, init="ones", train="b")
