"""Fold a trained adapter into the weights: no cost at inference (section 3)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Adapter, Path, Target
from vera_jax.adapters.layers import SCALE, flat_kernel
from vera_jax.adapters.sites import (
  all_sites,
  arrays_at,
  for_each_layer,
  layer_path,
)


def merge(
  params: Mapping[str, Any],
  projections: Mapping[str, Any],
  *,
  adapter: Adapter,
  targets: Mapping[Path, Target],
) -> dict[str, Any]:
  """The base's parameter tree with the adapted weights in place of its own.

  A new tree: `params` stays as it is, bit for bit. To unmerge is to use it
  again, for subtracting the delta would not give back the bits of W0. A
  quantised kernel becomes one of its scale's type.

  Args:
    params: base and adapter leaves in one tree, as `adapt`'s module has them.
    projections: the `projections` collection.
    adapter: the method.
    targets: the adapted sites, from `find_targets`.
  """
  merged = {
    path: leaf
    for path, leaf in flatten_dict(dict(params)).items()
    if not adapter.owns(path[-1])
  }
  sites = all_sites(adapter, targets, params, projections)
  weights = adapter.weights
  for path, site in sites.items():
    if weights is None:
      break
    kernel, bias = for_each_layer(
      lambda site, leaves: weights(leaves, site),
      site,
      arrays_at(projections, path),
      adapter.own(arrays_at(params, path)),
    )
    layer, columns = layer_path(path, targets[path]), targets[path].columns
    place = (..., slice(*columns) if columns else slice(None))
    for name, value in (("kernel", kernel), ("bias", bias)):
      if value is None:
        continue
      whole = merged[(*layer, name)]
      shape, dtype = whole.shape, whole.dtype
      if name == "kernel":
        scale = merged.pop((*layer, SCALE), None)
        leaves = {"kernel": whole} | ({} if scale is None else {SCALE: scale})
        outputs = whole.size // (targets[path].layers * site.inputs)
        whole = flat_kernel(leaves, site.stack, outputs)
        dtype = whole.dtype
      else:
        whole = whole.reshape(*site.stack, -1)
      whole = jnp.asarray(whole).at[place].set(value.astype(dtype))
      merged[(*layer, name)] = whole.reshape(shape)
  return unflatten_dict(merged)
