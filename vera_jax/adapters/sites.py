"""The sites of a model: found by tracing, seen on weights, started and read.

The model's own code is left alone. Its layers' calls are noted by path while
its shapes are traced; nothing is computed.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import DenyList, meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PRNGKeyArray

from vera_jax.adapters.interface import (
  EMPTY,
  MATRIX,
  Adapter,
  Path,
  Site,
  Target,
  View,
)
from vera_jax.adapters.layers import (
  flat_bias,
  flat_kernel,
  is_own_call,
  product_of,
)
from vera_jax.errors import UserError
from vera_jax.patterns import find

# Parts of fused kernels: layer pattern -> part's name -> (first, last) column.
Fused = Mapping[str, Mapping[str, tuple[int, int]]]
Tree = Mapping[str, Any]
EVERY = ".*"  # the pattern that names no layer: all that can be adapted


def matches(pattern: str, path: Path) -> bool:
  """Whether the regular expression matches the path's last names in full."""
  return bool(find(pattern, "/".join(path), form=r"(?:.*/)??(?:{})\Z"))


def parts_of(path: Path, fused: Fused) -> Mapping[str, tuple[int, int]]:
  """The parts that a layer's kernel is fused of; {} for an ordinary layer."""
  found = (parts for pattern, parts in fused.items() if matches(pattern, path))
  return next(found, {})


def is_on(link: Adapter, path: Path) -> bool:
  """Whether a chain's link adapts this site of the chain."""
  return not link.on or any(matches(pattern, path) for pattern in link.on)


class Call(NamedTuple):
  """A layer's call while it was traced: rows of x, widths, its own kernel."""

  tokens: int
  inputs: int
  outputs: int
  kernel: tuple[int, ...]
  view: View = MATRIX


class _Noted(struct.PyTreeNode, meta.AxisMetadata):
  """A kernel's shape that notes where `nn.scan` or `nn.vmap` stacks it."""

  value: Any
  axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, value: Any) -> "_Noted":
    return self.replace(value=value)

  def add_axis(self, index: int, params: Any) -> "_Noted":
    return self.replace(axes=(index, *self.axes))

  def remove_axis(self, index: int, params: Any) -> "_Noted":
    return self.replace(axes=self.axes[1:])


class Traced(NamedTuple):
  """What one trace of a model shows.

  Attributes:
    calls: of layers that can be adapted, by path.
    refused: why others can't be, by path.
    variables: the shapes of the model's, kernels boxed in `_Noted` unless the
      model itself reads one.
    applied: paths of the layers that are called once the model is initialised;
      None where it can't be applied to the inputs that initialise it.
  """

  calls: dict[Path, Call]
  refused: dict[Path, str]
  variables: Any
  applied: frozenset[Path] | None


def _trace(model: nn.Module, *args: Any, **kwargs: Any) -> Traced:
  """Traces the model, or remembers how it was traced on such inputs."""
  leaves, structure = jax.tree.flatten((args, kwargs))
  inputs = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
    for x in leaves
  )
  given = model, structure, inputs, jnp.zeros(()).dtype == jnp.float64
  try:
    hash(given)
  except TypeError:  # a field of the model is a list, say
    return _trace_once.__wrapped__(*given)
  return _trace_once(*given)


@lru_cache(maxsize=64)
def _trace_once(
  model: nn.Module, structure: Any, inputs: tuple[Any, ...], x64: bool
) -> Traced:
  args, kwargs = jax.tree.unflatten(structure, inputs)
  calls: dict[Path, Call] = {}
  refused: dict[Path, str] = {}
  applied: set[Path] = set()

  def note(next_fun, args, kwargs, context, *, boxed):
    layer, result = context.module, next_fun(*args, **kwargs)
    if context.method_name != "__call__" or is_own_call():
      return result
    own = layer.variables.get("params", {})
    product = product_of(layer, arrays_at(own), args, kwargs)
    if isinstance(product, str):
      refused[layer.path] = product
    elif product is not None:
      view = product.view
      kernel = meta.unbox(layer.get_variable("params", view.kernel))
      if boxed:
        layer.put_variable("params", view.kernel, _Noted(kernel))
      widths = product.inputs, product.outputs
      call = Call(product.rows, *widths, kernel.shape, view)
      known = calls.setdefault(layer.path, call)
      if known._replace(tokens=call.tokens) != call:
        refused[layer.path] = "its calls see its kernel in different ways"
    return result

  def note_path(next_fun, args, kwargs, context):
    if context.method_name == "__call__":
      applied.add(context.module.path)
    return next_fun(*args, **kwargs)

  try:
    with nn.intercept_methods(partial(note, boxed=True)):
      variables = init_shapes(model, *args, **kwargs)
  except Exception:  # a module that reads another's kernel found a box
    with nn.intercept_methods(partial(note, boxed=False)):
      variables = init_shapes(model, *args, **kwargs)
  for path in refused:
    calls.pop(path, None)

  def apply(key, variables, arrays, build):
    args, kwargs = build(arrays)
    return model.apply(
      variables,
      *args,
      rngs={"params": key},  # and of all other streams
      mutable=DenyList("params"),
      **kwargs,
    )

  arrays, build = _arrays_of((args, kwargs))
  key = jax.random.key(0)
  unboxed = meta.unbox(variables)
  try:
    with nn.intercept_methods(note_path):
      jax.eval_shape(partial(apply, build=build), key, unboxed, arrays)
  except Exception:  # such as a cache that takes one token at a time
    return Traced(calls, refused, variables, None)
  return Traced(calls, refused, variables, frozenset(applied))


def trace_sites(
  model: nn.Module,
  patterns: Sequence[str],
  *args: Any,
  fused: Fused = EMPTY,
  **kwargs: Any,
) -> tuple[dict[Path, Target], dict[Path, Call], Any]:
  """The sites of a model, by tracing it: nothing is computed.

  Returns:
    The sites that the patterns match and the calls of their layers, both by
    path, and the shapes of the model's variables.

  Raises:
    UserError: a pattern matches no site; the message lists those there are and
      says what is wrong with what it matches else. Or a layer that matches is
      never called, or the layers of a matching one are not stacked in front.
  """
  traced = _trace(model, *args, **kwargs)
  calls = traced.calls
  shapes = flatten_dict(traced.variables["params"])
  found: dict[Path, Target] = {}
  layers: dict[Path, Call] = {}
  astray: dict[Path, tuple[int, ...]] = {}  # by how their kernels are stacked
  for path, call in calls.items():
    noted = shapes[(*path, call.view.kernel)]
    if not isinstance(noted, _Noted):
      more = len(noted.shape) - len(call.kernel)
      noted = _Noted(noted, (0,) * more)
    stack = noted.value.shape[: len(noted.axes)]
    if any(noted.axes) or noted.value.shape != (*stack, *call.kernel):
      astray[path] = noted.axes
    found[path] = Target(call.inputs, call.outputs, stack, None, call.view)
    layers[path] = call
    for name, (first, last) in parts_of(path, fused).items():
      found[*path, name] = Target(
        call.inputs, last - first, stack, (first, last), call.view
      )
      layers[*path, name] = call
  held, other = _uncalled(traced, shapes)
  for pattern in patterns:
    named = any(matches(pattern, path) for path in found)
    wrong = {} if pattern == EVERY else held if named else held | other
    wrong = {p: why for p, why in wrong.items() if matches(pattern, p)}
    if wrong:
      listed = "\n  ".join(f"{'/'.join(p)}: {why}" for p, why in wrong.items())
      raise UserError(
        f"The target pattern {pattern!r} matches what no adapter would run"
        f" on:\n  {listed}\n{_there(found)}"
      )
    if not named:
      raise UserError(
        f"No layer's path ends in the target pattern {pattern!r}."
        f" {_there(found)}"
      )
  chosen = [p for p in found if any(matches(x, p) for x in patterns)]
  for path in chosen:
    layer = layer_path(path, found[path])
    if layer in astray:
      raise UserError(
        f"The kernels of {'/'.join(layer)} are stacked on axes {astray[layer]},"
        " or changed by a transformation. An adapter needs a stack's axis in"
        " front: nn.scan(..., variable_axes={'params': 0, 'projections': 0})."
      )
  both = [p for p in chosen if found[p].columns and p[:-1] in chosen]
  if both:
    raise UserError(
      f"The targets name both {'/'.join(both[0][:-1])} and its part"
      f" {both[0][-1]!r}; name one of them."
    )
  return (
    {p: found[p] for p in chosen},
    {p: layers[p] for p in chosen},
    meta.unbox(traced.variables),
  )


def _there(found: Mapping[Path, Target]) -> str:
  there = "\n  ".join("/".join(path) for path in found)
  return f"The layers that can be adapted are:\n  {there}"


def _uncalled(
  traced: Traced, shapes: Mapping[Path, Any]
) -> tuple[dict[Path, str], dict[Path, str]]:
  """What holds a matrix but can't be adapted, by path, and why.

  Returns:
    Layers that hold a kernel; and all other parameters of several axes, by
    their modules' paths and by their own.
  """
  held, other = dict(traced.refused), dict[Path, str]()
  called = {(*p, call.view.kernel) for p, call in traced.calls.items()}
  for path, leaf in shapes.items():
    if path in called or len(leaf.shape) < 2 or path[:-1] in held:
      continue
    why = (
      f"its {path[-1]} is read without a call of a known layer, by the module"
      " itself or by another one"
    )
    if path[-1] == "kernel":
      held[path[:-1]] = why
    else:
      other[path[:-1]] = other[path] = why
  if traced.applied is not None:
    for path in traced.calls.keys() - traced.applied:
      held[path] = (
        "it is called only while the model is initialised; later its kernel is"
        " read by another module, which passes by the call"
      )
  return held, other


def init_shapes(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
  """The shapes of the model's variables; what is no array stays static."""
  arrays, build = _arrays_of((args, kwargs))

  def init(key, arrays):
    args, kwargs = build(arrays)
    return model.init(key, *args, **kwargs)

  return jax.eval_shape(init, jax.random.key(0), arrays)


def _arrays_of(
  tree: Any,
) -> tuple[dict[int, Any], Callable[[Mapping[int, Any]], Any]]:
  """A tree's arrays, or shapes, and what puts arrays in their places."""
  leaves, structure = jax.tree.flatten(tree)
  arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape")}

  def build(arrays: Mapping[int, Any]) -> Any:
    every = [arrays.get(i, x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, every)

  return arrays, build


def layer_path(path: Path, target: Target) -> Path:
  """The path of the layer that a site is, or is a part of."""
  return path[:-1] if target.columns else path


def count_layers(targets: Mapping[Path, Target]) -> str:
  """What an adapter is on, such as "24 layers: 23 Dense, 1 Conv"."""
  layers = {
    layer_path(path, target): target for path, target in targets.items()
  }
  kinds = Counter[str]()
  for target in layers.values():
    kinds[target.view.kind] += target.layers
  shown = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
  parts = {path[-1] for path, target in targets.items() if target.columns}
  named = f", in the parts {', '.join(sorted(parts))}" if parts else ""
  total = kinds.total()
  return f"{total} layer{'s' * (total != 1)}: {shown}{named}"


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
    UserError: the method can't adapt a layer of this kind.
  """
  sites = {}
  for path, target in targets.items():
    _check_kind(adapter, path, target)
    layer, view = arrays_at(params, layer_path(path, target)), target.view
    outputs = layer[view.kernel].size // (target.layers * target.inputs)
    columns = (..., slice(*target.columns or (None,)))
    bias = flat_bias(layer, target.stack)
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
  given: Mapping[Path, Any],
) -> dict[Path, Any]:
  """function(site, given[path]) for every site, mapped over stacked layers.

  Args:
    function: takes a site without stack.
    sites: from `all_sites`.
    projections: those at a site's path are stacked as the site is.
    given: trees whose leaves are stacked as the site is.
  """

  def one_layer(site: Site, kernel: Any, bias: Any, own: Any, given: Any):
    shared = {**site.shared, **own}
    layer = site._replace(
      kernel=lambda: kernel, bias=bias, shared=shared, stack=()
    )
    return function(layer, given)

  found = {}
  for path, site in sites.items():
    mapped: Callable[..., Any] = partial(one_layer, site)
    for _ in site.stack:
      mapped = jax.vmap(mapped)
    own = dict(arrays_at(projections, path))
    found[path] = mapped(site.kernel(), site.bias, own, given[path])
  return found


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
    own = jax.random.fold_in(key, zlib.crc32(role.encode()))
    for number in numbers:
      own = jax.random.fold_in(own, number)
    if site.stack:
      layers = jnp.arange(targets[path].layers)
      own = jax.vmap(jax.random.fold_in, (None, 0))(own, layers)
      own = own.reshape(site.stack)
    keys[path] = own
  made = map_sites(lambda site, key: start(key, site), sites, projections, keys)
  return _tree(root, made)


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
  """("encoder", "layer_3", "query") -> ("encoder/layer/query", [3])."""
  name = "/".join(path)
  numbers = [int(n) for n in re.findall(r"_(\d+)(?=/|$)", name)]
  return re.sub(r"_\d+(?=/|$)", "", name), numbers
