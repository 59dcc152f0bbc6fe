"""What an adapter comes to on some sites, from their shapes alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.interface import (
  Adapter,
  Leaves,
  Path,
  Site,
  Target,
)
from vera_jax.adapters.plans import AUTO, FACTORED, WHOLE, Split, choose
from vera_jax.adapters.sites import (
  all_sites,
  arrays_at,
  first_leaves,
  is_on,
  layer_path,
  make_shared,
  map_sites,
  own_leaves,
)


def leaf_shapes(adapter: Adapter, path: Path, target: Target) -> dict[str, Any]:
  """The shapes of a site's leaves by name, with its stack's axes."""
  shapes = _traced(adapter, {path: target}, lambda *trees: trees[1])
  return dict(arrays_at(shapes, path))


def adapter_size(adapter: Adapter, targets: Mapping[Path, Target]) -> int:
  """Trained numbers of an adapter on these sites, counted from shapes."""
  leaves = _traced(adapter, targets, lambda *trees: trees[1])
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))


def plans_at(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  tokens: Mapping[Path, int],
  *,
  plan: str = AUTO,
  forwards: int = 1,
  splits: Mapping[Path, Split] | None = None,
) -> dict[Path, str]:
  """How each low-rank delta multiplies.

  Args:
    adapter: the method; sites where it has no low-rank delta are left out.
    targets: the sites.
    tokens: rows of x at each.
    plan, forwards: as for `adapt`.
    splits: of the sites that a mesh divides.

  Raises:
    UserError: the method can't be multiplied by this plan.
  """
  chosen: dict[Path, str] = {}

  def choose_at(site: Site, leaves: Leaves) -> None:
    for link in adapter.methods:
      if link.low_rank is None or not is_on(link, site.path):
        continue
      if link.is_random:  # so it is in training, which draws numbers
        chosen[site.path] = FACTORED
        continue
      chosen[site.path] = choose(
        tokens[site.path],
        link.low_rank(link.own(leaves), site),
        plan=plan,
        forwards=forwards,
        view=targets[site.path].view,
        split=(splits or {}).get(site.path, WHOLE),
        path=site.path,
      )

  def at_all_sites(params: Any, first: Any, projections: Any) -> None:
    params = unflatten_dict(flatten_dict(params) | flatten_dict(first))
    sites = all_sites(adapter, _as_matrices(targets), params, projections)
    leaves = own_leaves(adapter, sites, params)
    map_sites(choose_at, sites, projections, leaves)

  _traced(adapter, targets, at_all_sites)
  return chosen


def _traced(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  function: Callable[[Any, Any, Any], Any],
) -> Any:
  """function(parameters, first leaves, projections) on layers of these widths;
  nothing is computed."""
  matrices = _as_matrices(targets)

  def start(params: Any) -> Any:
    projections = make_shared(adapter, matrices, params)
    key = jax.random.key(0)
    first = first_leaves(adapter, matrices, params, projections, key)
    return function(params, first, projections)

  return jax.eval_shape(start, _layer_shapes(matrices))


def _as_matrices(targets: Mapping[Path, Target]) -> dict[Path, Target]:
  """The sites as if all kernels were stored as matrices."""
  return {
    path: target._replace(view=target.view._replace(axes=()))
    for path, target in targets.items()
  }


def _layer_shapes(targets: Mapping[Path, Target]) -> dict[str, Any]:
  """The shapes of kernels and biases that have these sites."""
  shapes: dict[Path, Any] = {}
  for path, target in targets.items():
    outputs = target.columns[1] if target.columns else target.outputs
    for name, shape in (
      (target.view.kernel, (*target.stack, target.inputs, outputs)),
      ("bias", (*target.stack, outputs)),
    ):
      leaf = (*layer_path(path, target), name)
      if leaf not in shapes or shapes[leaf].shape[-1] < outputs:
        shapes[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return unflatten_dict(shapes)
