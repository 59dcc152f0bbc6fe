"""Fold a trained adapter into the kernels: no cost at inference (section 3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import Adapter, Path, Target


def merge(
  params: Mapping[str, Any],
  projections: Mapping[str, Any],
  *,
  adapter: Adapter,
  targets: Mapping[Path, Target],
) -> dict[str, Any]:
  """The base's parameter tree with W0 + delta in place of each adapted W0.

  A new tree: `params` stays as it is, bit for bit. To unmerge is to use it
  again, for subtracting the delta would not give back the bits of W0.

  Args:
    params: base and adapter leaves in one tree, as `adapt`'s module has them.
    projections: the `projections` collection.
    adapter: the method.
    targets: the adapted layers, from `find_targets`.
  """
  flat = flatten_dict(dict(params))
  matrices = flatten_dict(dict(projections))
  shared = {k[0]: v for k, v in matrices.items() if len(k) == 1}
  for path, target in targets.items():
    size = target.inputs, target.outputs
    kernel = flat[(*path, "kernel")]
    leaves = {name: flat.pop((*path, name)) for name in adapter.init(*size)}
    own = {k[-1]: v for k, v in matrices.items() if k[:-1] == path}
    delta = partial(adapter.kernel, inputs=size[0], outputs=size[1])
    for _ in target.stack:
      delta = jax.vmap(delta, in_axes=(0, 0 if own else None))
    added = delta(leaves, own or shared).reshape(kernel.shape)
    total = kernel.astype(jnp.float32) + added
    flat[(*path, "kernel")] = total.astype(kernel.dtype)
  return unflatten_dict(flat)
