"""Uni-LoRA: one vector for the whole network (arXiv 2506.00799).

  h = W0 x + B A x,   A, B = theta[index] / sqrt(count[index])

Every entry of every layer's A (r x in) and B (out x r) is one of theta's, at
random; count says how often an entry is used, so that the map from theta to all
of them keeps lengths. theta is all that is trained, whatever the number of
layers. The indices come from numpy's generator as PEFT draws them, each entry
of theta equally often up to one, in the order of the layers and A before B.

theta starts uniform in a small range: as A and B share it, it can't start at 0,
and the first output is that of the base only nearly. There is no alpha.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
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
from vera_jax.adapters.projections import check_entries
from vera_jax.adapters.table import UniloraSettings as Settings
from vera_jax.adapters.table import unilora as unilora

THETA = "unilora_theta"


def make_unilora(s: Settings) -> Adapter:
  """Uni-LoRA as an `Adapter`: `size` trained numbers in all."""
  rank, size = s.rank, s.size

  def shared(sites: Mapping[Path, Target | Site]) -> dict[str, Any]:
    """The indices of each site's A and B, and theta's scale."""
    # Layers in their order: those of a stack one after another, as if looped.
    order = [
      (path, layer)
      for stack, paths in itertools.groupby(sites, lambda p: sites[p].stack)
      for group in [list(paths)]
      for layer in np.ndindex(stack)
      for path in group
    ]
    shapes = {
      (*path, name): shape
      for path, site in sites.items()
      for name, shape in (
        ("A", (rank, site.inputs)),
        ("B", (site.outputs, rank)),
      )
    }
    places = [(p, n, layer) for p, layer in order for n in "AB"]
    lengths = [int(np.prod(shapes[*p, n])) for p, n, _ in places]
    check_entries(sum(lengths) + size, sites)
    drawn = _indices(sum(lengths), size, s.projection_seed)
    indices = {
      key: np.empty((*sites[key[:-1]].stack, *shape), np.int32)
      for key, shape in shapes.items()
    }
    pieces = np.split(drawn, np.cumsum(lengths)[:-1])
    for (path, name, layer), piece in zip(places, pieces, strict=True):
      indices[*path, name][layer] = piece.reshape(shapes[*path, name])
    counts = np.bincount(drawn, minlength=size).astype(np.float32)
    tree = unflatten_dict({p: jnp.asarray(x) for p, x in indices.items()})
    return {**tree, "scale": jnp.asarray(1 / np.sqrt(np.maximum(counts, 1)))}

  def common(key: Array, sites: Mapping[Path, Site]) -> dict[str, Array]:
    del sites
    theta = jax.random.uniform(
      key, (size,), jnp.float32, minval=-s.theta_init, maxval=s.theta_init
    )
    return {THETA: theta}

  def low_rank(leaves: Leaves, site: Site) -> LowRank:
    del leaves
    theta = site.common[THETA] * site.shared["scale"]
    A, B = theta[site.shared["A"]], theta[site.shared["B"]]
    return LowRank(down=A.T, up=B.T, trains_down=True, trains_up=True)

  return Adapter(
    name="unilora",
    shared=shared,
    common=common,
    weights=add_low_rank(low_rank),
    low_rank=low_rank,
    prepare=as_they_are,
  )


def _indices(entries: int, size: int, seed: int) -> np.ndarray:
  """For each entry of all A and B its place in theta: PEFT's assignment."""
  stream = np.random.default_rng(seed)
  places = np.repeat(np.arange(size), entries // size)
  more = stream.choice(size, size=entries % size, replace=False)
  places = np.concatenate([places, more]) if entries % size else places
  stream.shuffle(places)
  return places.astype(np.int32)
