"""Fold a trained adapter into the weights: no cost at inference (section 3)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Adapter, Path, Target
from vera_jax.adapters.layers import flat_kernel, own_kernel
from vera_jax.adapters.sites import (
  all_sites,
  is_on,
  layer_path,
  map_sites,
  own_leaves,
)
from vera_jax.errors import UserError
from vera_jax.operations.quantised import plain


def merge(
  params: Mapping[str, Any],
  projections: Mapping[str, Any],
  *,
  adapter: Adapter,
  targets: Mapping[Path, Target],
) -> dict[str, Any]:
  """The base's parameter tree with the adapted weights in place of its own.

  A new tree, without boxes of `nn.with_partitioning`: `params` stays as it is,
  bit for bit. To unmerge is to use it again, for subtracting the delta would
  not give back the bits of W0. Quantised kernels are dequantised, those without
  an adapter too.

  Args:
    params: base and adapter leaves in one tree, as `adapt`'s module has them.
    projections: the `projections` collection.
    adapter: the method.
    targets: the adapted sites, from `find_targets`.

  Raises:
    UserError: the adapter's leaves lie at other sites than the targets.
  """
  flat = flatten_dict(meta.unbox(dict(params)))
  _check_leaves(flat, adapter, targets)
  merged = {
    path: plain(leaf)
    for path, leaf in flat.items()
    if not adapter.owns(path[-1])
  }
  weights = adapter.weights
  if weights is None:  # what was trained is the base itself
    return unflatten_dict(merged)
  sites = all_sites(adapter, targets, params, projections)
  adapted = map_sites(
    lambda site, leaves: weights(leaves, site),
    sites,
    projections,
    own_leaves(adapter, sites, params),
  )
  for path, (kernel, bias) in adapted.items():
    target, layer = targets[path], layer_path(path, targets[path])
    stack, view = target.stack, target.view
    columns = (..., slice(*target.columns or (None,)))
    leaf = jnp.asarray(merged[*layer, view.kernel])
    outputs = leaf.size // (target.layers * target.inputs)
    full = flat_kernel({view.kernel: leaf}, stack, outputs, view)
    full = full.at[columns].set(kernel.astype(full.dtype))
    merged[*layer, view.kernel] = own_kernel(full, leaf.shape, stack, view)
    if bias is not None:
      leaf = jnp.asarray(merged[*layer, "bias"])
      full = leaf.reshape(*stack, -1)
      full = full.at[columns].set(bias.astype(leaf.dtype))
      merged[*layer, "bias"] = full.reshape(leaf.shape)
  return unflatten_dict(merged)


def _check_leaves(
  flat: Mapping[Path, Any], adapter: Adapter, targets: Mapping[Path, Target]
) -> None:
  """Raises a UserError for leaves at no target, or a target without leaves."""
  # leaves at the root are for all sites, and not every method has others
  sites = {path[:-1] for path in flat if adapter.owns(path[-1])} - {()}
  bare = {
    path
    for path in targets.keys() - sites - {()}
    if any(link.init and is_on(link, path) for link in adapter.methods)
  }
  for path in sorted((sites - targets.keys()) | bare):
    raise UserError(
      f"The parameters have {'no ' if path in bare else ''}leaves of"
      f" {adapter.name} at {'/'.join(path)}, which is"
      f" {'one' if path in bare else 'none'} of the targets: give those that"
      " find_targets finds for the adapter."
    )
