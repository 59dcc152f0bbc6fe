"""Four throw-away methods that the adapter interface must be able to express.

They stand for the hard cases of methods to come: random numbers with a penalty
in the loss, matrices taken from W0, a part of a fused kernel, and a kernel in
eight bits.
Nothing outside `vera_jax/adapters` may know of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import (
  EMPTY,
  Adapter,
  LowRank,
  as_they_are,
)
from vera_jax.adapters.magnitude import dvora
from vera_jax.adapters.products import add_low_rank
from vera_jax.adapters.vera import vera
from vera_jax.operations.quantised import quantise, stack_layers


class Probe(NamedTuple):
  """A method and what it is put on.

  Attributes:
    adapter: the method.
    targets: patterns.
    fused: parts of fused kernels.
    quantised: whether the base's kernels are stored in eight bits.
  """

  adapter: Adapter
  targets: tuple[str, ...] = ("heads", "out")
  fused: Mapping[str, Any] = EMPTY
  quantised: bool = False


def noisy(rank: int = 3) -> Adapter:
  """VeRA whose d is drawn in training, with a penalty on its spread."""
  base = vera(rank)

  def init(key, site):
    first = jax.random.normal(key, (rank,))
    return {
      "noisy_d": 0.1 + 0.01 * first,
      "noisy_b": jnp.zeros(site.outputs),
      "noisy_log_sigma": jnp.full(rank, -2.0),
    }

  def low_rank(leaves, site):
    vectors = {"vera_d": leaves["noisy_d"], "vera_b": leaves["noisy_b"]}
    return base.low_rank(vectors, site)

  def forward(leaves, site, x, key, inner):
    factors = low_rank(leaves, site)
    spread = jnp.exp(leaves["noisy_log_sigma"])
    d = factors.inner
    if key is not None:
      d = d + spread * jax.random.normal(key, d.shape)
    y = inner(x)
    along = (1,) * (y.ndim - 1) + (-1,)
    thin = site.project(x, factors.down) * d.reshape(along)
    y = y + (thin @ factors.up) * factors.outer.reshape(along)
    return y, jnp.mean(spread**2)

  return Adapter(
    "noisy",
    init=init,
    weights=add_low_rank(low_rank),
    shared=base.shared,
    forward=forward,
    prepare=as_they_are,
  )


def from_weights(rank: int = 2) -> Adapter:
  """A trained r x r matrix between the singular vectors of W0."""

  def shared(sites):
    found = {}
    for path, site in sites.items():
      u, s, v = jnp.linalg.svd(site.kernel(), full_matrices=False)
      found[*path, "down"] = u[..., :rank] * s[..., None, :rank]
      found[*path, "up"] = v[..., :rank, :]
    return unflatten_dict(found)

  def low_rank(leaves, site):
    up = leaves["from_weights_r"] @ site.shared["up"]
    return LowRank(site.shared["down"], up, trains_up=True)

  return Adapter(
    "from_weights",
    init=lambda key, site: {"from_weights_r": jnp.zeros((rank, rank))},
    weights=add_low_rank(low_rank),
    shared=shared,
    low_rank=low_rank,
    prepare=as_they_are,
  )


def with_codes(params: Any) -> Any:
  """Every block's kernel but `out` as int8 codes and a scale per output."""
  flat = flatten_dict(params)
  for path in [p for p in flat if p[-1] == "kernel" and p[-2] in CODED]:
    kernel = np.asarray(flat[path])
    layers = kernel if "layer" in path else kernel[None]
    made = [
      quantise(layer.reshape(len(layer), -1), "int8", axes=layer.shape)
      for layer in layers
    ]
    flat[path] = stack_layers(made) if "layer" in path else made[0]
  return jax.tree.map(jnp.asarray, unflatten_dict(flat))


CODED = ("fused", "heads")
QUERY = {"fused": {"query": (0, 8), "key": (8, 16), "value": (16, 24)}}

PROBES = {
  "random numbers": Probe(noisy()),
  "matrices from W0": Probe(from_weights()),
  "columns": Probe(vera(3), ("query", "value"), QUERY),
  "int8": Probe(dvora(3), quantised=True),
}
