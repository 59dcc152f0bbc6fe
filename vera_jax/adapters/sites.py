"""The sites of a model: named by patterns, seen on weights, started and read.

`tracing.py` finds them.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PRNGKeyArray

from vera_jax.adapters.interface import (
  EMPTY,
  Adapter,
  Path,
  Site,
  Target,
  View,
)
from vera_jax.adapters.layers import (
  flat_bias,
  flat_kernel,
)
from vera_jax.errors import UserError
from vera_jax.patterns import find

# Parts of fused kernels: layer pattern -> part's name -> (first, last) column.
Fused = Mapping[str, Mapping[str, tuple[int, int]]]
Tree = Mapping[str, Any]
EVERY = ".*"  # the pattern that names no layer: all that can be adapted


def matches(pattern: str, path: Path) -> bool:
  """Whether the regular expression matches the path's last names in full."""
  return bool(find(pattern, "/".join(path), within=r"(?:.*/)??(?:{})\Z"))


def parts_of(path: Path, fused: Fused) -> Mapping[str, tuple[int, int]]:
  """The parts that a layer's kernel is fused of; {} for an ordinary layer."""
  for pattern, parts in fused.items():
    if matches(pattern, path):
      return parts
  return {}


def is_on(link: Adapter, path: Path) -> bool:
  """Whether a chain's link adapts this site of the chain."""
  return not link.on or any(matches(pattern, path) for pattern in link.on)


def layer_path(path: Path, target: Target) -> Path:
  """The path of the parameters that a site is on, or on a part of."""
  path = path[:-1] if target.columns else path
  return path[:-1] if target.view.in_scope else path


def count_layers(targets: Mapping[Path, Target]) -> str:
  """What an adapter is on, such as "24 layers: 23 Dense, 1 Conv"."""
  layers = {
    (layer_path(path, target), target.view.kernel): target
    for path, target in targets.items()
  }
  kinds = Counter[str]()
  for target in layers.values():
    kinds[target.view.kind] += target.layers
  shown = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
  parts = {path[-1] for path, target in targets.items() if target.columns}
  named = f", in the parts {', '.join(sorted(parts))}" if parts else ""
  total = kinds.total()
  noun = "layer" if total == 1 else "layers"
  return f"{total} {noun}: {shown}{named}"


def arrays_at(tree: Tree, path: Path = ()) -> Tree:
  """The arrays (or shapes) at a path of a tree, without the subtrees there."""
  for name in path:
    tree = tree.get(name, {})
  return {
    name: meta.unbox(leaf)  # of `nn.with_partitioning`, if it has a box
    for name, leaf in tree.items()
    if not isinstance(leaf, Mapping)
  }


def all_sites(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  params: Tree,
  projections: Tree = EMPTY,
) -> dict[Path, Site]:
  """Every site on a whole parameter tree, stacked ones as a whole.

  Raises:
    UserError: the method can't adapt a layer of this kind, or the tree has no
      weights of a layer.
  """
  sites = {}
  for path, target in targets.items():
    _check_kind(adapter, path, target)
    layer, view = arrays_at(params, layer_path(path, target)), target.view
    if view.kernel not in layer:
      raise UserError(
        f"The params have no {view.kernel} at {'/'.join(path)}, where the"
        " adapter is to be; give the model's whole tree."
      )
    size = math.prod(layer[view.kernel].shape)
    outputs = size // (target.layers * target.inputs)
    columns = (..., slice(*target.columns or (None,)))
    bias = None if view.in_scope else flat_bias(layer, target.stack)
    sites[path] = Site(
      path=path,
      inputs=target.inputs,
      outputs=target.outputs,
      kernel=partial(_kernel, layer, target.stack, outputs, view, columns),
      bias=None if bias is None else bias[columns],
      shared=arrays_at(projections),
      common=adapter.own(arrays_at(params)),
      stack=target.stack,
      view=view,
    )
  return sites


def _kernel(
  layer: Tree, stack: Any, outputs: int, view: View, columns: Any
) -> Array:
  return flat_kernel(layer, stack, outputs, view)[columns]


def _check_kind(adapter: Adapter, path: Path, target: Target) -> None:
  depthwise = target.view.groups > 1 and target.inputs == target.view.taps
  for link in adapter.methods:
    if depthwise and link.low_rank is not None and is_on(link, path):
      raise UserError(
        f"{'/'.join(path)} is a depthwise convolution: each channel has a"
        f" window of its own, and no matrix that {link.name}'s could be added"
        " to. Leave it out of the targets, or scale it: by ia3, or both by"
        f" {link.name}+ia3 with targets of their own."
      )


def map_sites(
  function: Callable[[Site, Any], Any],
  sites: Mapping[Path, Site],
  projections: Tree,
  trees: Mapping[Path, Any],
) -> dict[Path, Any]:
  """function(site, trees[path]) for every site, mapped over stacked layers.

  Args:
    function: takes a site without stack.
    sites: from `all_sites`.
    projections: those at a site's path are stacked as the site is.
    trees: by path, with leaves that are stacked as the site is.
  """

  def one_layer(site: Site, kernel: Any, bias: Any, matrices: Any, tree: Any):
    shared = {**site.shared, **matrices}
    layer = site._replace(
      kernel=lambda: kernel, bias=bias, shared=shared, stack=()
    )
    return function(layer, tree)

  results = {}
  for path, site in sites.items():
    mapped: Callable[..., Any] = partial(one_layer, site)
    for _ in site.stack:
      mapped = jax.vmap(mapped)
    matrices = dict(arrays_at(projections, path))
    results[path] = mapped(site.kernel(), site.bias, matrices, trees[path])
  return results


def own_leaves(
  adapter: Adapter, sites: Mapping[Path, Site], params: Tree
) -> dict[Path, dict[str, Any]]:
  """The adapter's leaves of every site in a whole parameter tree."""
  return {path: adapter.own(arrays_at(params, path)) for path in sites}


def make_shared(
  adapter: Adapter, targets: Mapping[Path, Target], params: Tree
) -> dict[str, Any]:
  """The `projections` collection; {} where the method has none."""
  if adapter.shared is None or not targets:
    return {}
  return dict(adapter.shared(all_sites(adapter, targets, params)))


def first_leaves(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  params: Tree,
  projections: Tree,
  key: PRNGKeyArray,
) -> dict[str, Any]:
  """The leaves that training starts from, as a tree to join to `params`.

  They are made from the weights that are there, so these must be loaded first.
  The same layer gets the same random numbers in a scanned and a looped stack.
  """
  sites = all_sites(adapter, targets, params, projections)
  root: dict[str, Any] = {}
  if adapter.common is not None and sites:
    root = adapter.common(jax.random.fold_in(key, 0), sites)
    sites = {p: s._replace(common=root) for p, s in sites.items()}
  start = adapter.init
  if start is None:
    return root
  keys: dict[Path, Any] = {}
  for path, site in sites.items():
    role, numbers = role_of(path)
    site_key = jax.random.fold_in(key, zlib.crc32(role.encode()))
    for number in numbers:
      site_key = jax.random.fold_in(site_key, number)
    if site.stack:
      layers = jnp.arange(targets[path].layers)
      site_key = jax.vmap(jax.random.fold_in, (None, 0))(site_key, layers)
      site_key = site_key.reshape(site.stack)
    keys[path] = site_key
  made = map_sites(lambda site, key: start(key, site), sites, projections, keys)
  return _tree(root, made)


def identity_leaves(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  params: Tree,
  projections: Tree,
) -> dict[str, Any]:
  """Leaves with which the adapted weights are those of `params` themselves.

  A low-rank delta is 0 where all that is trained of it is. Other methods start
  at the weights that are there. A method that a bank takes is one of these.
  """
  first = first_leaves(adapter, targets, params, projections, jax.random.key(0))
  return unflatten_dict(
    {
      path: jnp.zeros_like(leaf)
      if any(
        link.low_rank is not None and link.owns(path[-1])
        for link in adapter.methods
      )
      else leaf
      for path, leaf in flatten_dict(first).items()
    }
  )


def prepared_leaves(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  params: Tree,
  projections: Tree,
) -> dict[str, Any]:
  """The adapter's leaves as a bank keeps them; `params` is the whole tree.

  Raises:
    UserError: the method can't share a batch.
  """
  prepare = adapter.prepare
  if prepare is None:
    raise UserError(
      f"{adapter.name} can't share a batch with other adapters in a bank: each"
      " row would need a kernel of its own. Use a Predictor for each."
    )
  sites = all_sites(adapter, targets, params, projections)
  made = map_sites(
    lambda site, own: dict(prepare(own, site)),
    sites,
    projections,
    own_leaves(adapter, sites, params),
  )
  return _tree(adapter.own(arrays_at(params)), made)


def _tree(
  root: Mapping[str, Any], sites: Mapping[Path, Mapping[str, Any]]
) -> dict[str, Any]:
  flat: dict[Path, Any] = {(name,): leaf for name, leaf in root.items()}
  for path, leaves in sites.items():
    flat |= {(*path, name): leaf for name, leaf in leaves.items()}
  return unflatten_dict(flat)


def role_of(path: Path) -> tuple[str, list[int]]:
  """("encoder", "layer_3", "query") -> ("encoder/layer/query", [3]).

  A layer's name and number, the same in a looped and in a scanned stack.
  """
  name = "/".join(path)
  numbers = [int(n) for n in re.findall(r"_(\d+)(?=/|$)", name)]
  return re.sub(r"_\d+(?=/|$)", "", name), numbers
