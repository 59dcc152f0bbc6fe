"""Put an adapter on any nnx model, in place.

The class of each adapted layer is replaced by one derived from it, whose call
makes the adapted product, so that the model's code, paths and `isinstance` stay
as they are. The trained leaves lie beside the layer's own parameters, as
`nnx.LoRAParam`: whatever trains, counts or saves those takes them. What all
layers share is made anew from its seed at each call of the model and lies in no
state, or it is held once, in fields of the model itself.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import update_wrapper, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from vera_jax.adapters import saved
from vera_jax.adapters.apply import check_choices, check_links
from vera_jax.adapters.intercept import Interception, Piece
from vera_jax.adapters.interface import EMPTY, Adapter, Path, Site, Target
from vera_jax.adapters.kinds.embed import table_site
from vera_jax.adapters.merge import merge as merge_tree
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.plans import AUTO, check_plan
from vera_jax.adapters.sites import (
  Fused,
  arrays_at,
  first_leaves,
  layer_path,
  make_shared,
)
from vera_jax.adapters.targets import Reasons, check_parts, choose, with_parts
from vera_jax.errors import UserError
from vera_jax.nnx.layers import (
  PLACE,
  QWIX,
  ROOT,
  UNADAPTED,
  Projection,
  Seen,
  bare,
  beside_qwix,
  check_activations,
  see,
  see_call,
  value_of,
  values_of,
)
from vera_jax.nnx.twins import check_biases, twin_of
from vera_jax.operations.quantised import is_quantised
from vera_jax.patterns import find

NUMBER = "number_in_stack"  # a layer's, where a method draws numbers
PROJECTIONS = ("made", "held")
STACK_AXES = (0, 1)  # a vector has no others
PARAMS = nnx.Not(Projection)  # of the base and the adapter


class Part(nnx.Module):
  """The leaves of one part of a fused kernel."""


@dataclass
class Adaptation(Interception):
  """An adapter on a model, and what the model's layers need during a call.

  Attributes:
    sites: by path.
    classes: those derived for it, by the class and the kernel of a layer.
  """

  variables: Mapping[str, Any] = field(default_factory=dict)
  keyed: bool = False
  sites: Mapping[Path, Target] = field(default_factory=dict)
  classes: dict[tuple[type, str], type] = field(default_factory=dict)

  def is_target(self, path: Path) -> bool:
    return path in self.sites

  def called(self, root: nnx.Module | None) -> "Adaptation":
    """The same during a call of the model; None where a layer is called alone.

    Raises:
      UserError: the layer needs what lies at the model's root.
    """
    if root is None and any(link.common for link in self.adapter.methods):
      raise UserError(
        f"{self.adapter.name} has leaves that all layers share, at the model's"
        " root: call the whole model, and not a layer of it."
      )
    leaves = self.adapter.own(_values(root, nnx.LoRAParam))
    projections = self.shared_at(root)
    return replace(
      self, variables={"params": leaves, "projections": projections}
    )

  def shared_at(self, root: nnx.Module | None) -> Mapping[str, Any]:
    """The projections of all layers: those that the model holds, or made anew
    from their seed."""
    held = _values(root, Projection)
    if held or self.adapter.shared is None or self.adapter.from_base:
      return held
    return arrays_at(self.adapter.shared(self.sites))

  @beside_qwix
  def call(self, layer: Any, base: type, args: Any, kwargs: Any) -> Any:
    """A call of an adapted layer, wherever in the model it lies."""
    calls = _CALLS.get() or self.called(None)
    path = tuple(vars(layer)[PLACE].split("/"))
    call = see_call(layer, base, args, kwargs)
    if isinstance(call, str):
      name = "/".join(path)
      raise UserError(f"{name} can't be adapted in this call: {call}.")
    call = call._replace(site=call.site._replace(path=path))
    training, key = _TRAINING.get(), None
    if training is not None and self.adapter.is_random:
      of_layer = zlib.crc32("/".join(path).encode())
      key = jax.random.fold_in(training.key, of_layer)
      if NUMBER in vars(layer):
        key = jax.random.fold_in(key, vars(layer)[NUMBER].get_value()[0])
    quantised = is_quantised(values_of(layer)[call.site.view.kernel])
    y, penalties = calls.product(
      call,
      calls.pieces_at(layer, call.site),
      remake=quantised and self.forwards == 1,
      draw=None if key is None else lambda: key,
    )
    if training is not None:
      training.penalties.extend(penalties)
    return y

  @beside_qwix
  def attend(self, layer: Any, base: Any, args: Any, kwargs: Any) -> Any:
    """The tied output layer, by flax's own code on the adapted table."""
    calls = _CALLS.get() or self.called(None)
    table = values_of(layer)["embedding"]
    path = tuple(vars(layer)[PLACE].split("/"))
    site = table_site(base.__name__, table)._replace(path=path)
    adapted, _ = calls.whole_weights(calls.pieces_at(layer, site))
    changed = {"embedding": adapted.astype(table.dtype)}
    return base.attend(bare(layer, base, changed), *args, **kwargs)

  def pieces_at(self, layer: nnx.Module, site: Site) -> list[Piece]:
    """The layer's sites, with their leaves and the matrices of their own."""
    parts = {n: x for n, x in vars(layer).items() if isinstance(x, Part)}
    leaves, matrices = (
      {name: _values(part, kind) for name, part in parts.items()}
      | _values(layer, kind)
      for kind in (nnx.LoRAParam, Projection)
    )
    return list(self.pieces(site, leaves, matrices))

  def derived(self, base: Any, kernel: str = "") -> type:
    """The class of an adapted layer, whose call makes the adapted product, or,
    without a kernel, of the model, whose call gives its layers what they share.

    It has its base's name, as whoever prints or compares it expects.
    """
    if known := self.classes.get((base, kernel)):
      return known
    adaptation = self

    @wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
      if kernel:
        return adaptation.call(self, base, args, kwargs)
      if type(self) is not derived and QWIX in vars(type(self)):
        raise UserError(
          "The model was quantised by qwix after it was adapted, which would"
          " quantise the adapter: call qwix.quantize_model first, then adapt."
        )
      token = _CALLS.set(adaptation.called(self))
      try:
        return base.__call__(self, *args, **kwargs)
      finally:
        _CALLS.reset(token)

    def read(self: Any, name: str) -> Any:
      if name == kernel and _CALLS.get() is not None:
        raise UserError(
          f"The model reads the {kernel} of {vars(self)[PLACE]} itself, where"
          " it is not adapted. Leave the layer out of the targets."
        )
      return base.__getattribute__(self, name)

    def reduce(self: Any, protocol: Any) -> Any:
      _, _, *state = base.__reduce_ex__(self, protocol)
      return adaptation.new, (base, kernel), *state

    body: dict[str, Any] = {ROOT: self, UNADAPTED: base, "__call__": call}
    body["__reduce_ex__"] = reduce
    if kernel:
      body["__getattribute__"] = read
    if kernel and issubclass(base, nnx.Embed):

      @wraps(base.attend)
      def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        return adaptation.attend(self, base, args, kwargs)

      body["attend"] = attend
    derived = type(base)(base.__name__, (base,), body)
    update_wrapper(derived, base, updated=())
    if not kernel:
      setattr(
        derived, QWIX, derived
      )  # so that qwix derives its class from this
    self.classes[base, kernel] = derived
    return derived

  def new(self, base: type, kernel: str) -> Any:
    """A module of an adapted class, which pickle fills."""
    return object.__new__(self.derived(base, kernel))

  def __reduce__(self) -> Any:
    """For pickle, by the method's name and settings.

    Raises:
      UserError: the table of methods has no such method.
    """
    about = saved.identity(self)
    method = about["method"], about["settings"]
    make_adapter(*method)
    choices = self.targets, about["fused"], self.plan, self.forwards
    return _adaptation, (method, choices, self.sites)


def _adaptation(
  method: Any, choices: tuple[Any, Any, Any, Any], sites: Any
) -> Adaptation:
  return Adaptation(make_adapter(*method)[0], *choices, sites=sites)


class Training(NamedTuple):
  """A call of the model in training; see `training`."""

  key: Array
  penalties: list[Array]

  @property
  def penalty(self) -> Array:
    """The sum of what the methods add to the mean loss."""
    return sum(self.penalties, start=jnp.zeros(()))


_CALLS = ContextVar[Adaptation | None]("calls", default=None)
_TRAINING = ContextVar[Training | None]("training", default=None)


@contextmanager
def training(key: Array) -> Iterator[Training]:
  """Calls in this context draw random numbers, where the method does (PVeRA).

  The key comes from outside, so that the model's state holds none. Add the
  `penalty` of what this returns to the mean loss.
  """
  active = Training(key, [])
  token = _TRAINING.set(active)
  try:
    yield active
  finally:
    _TRAINING.reset(token)


def adapt(
  model: Any,
  adapter: Adapter,
  *,
  targets: Sequence[str],
  rngs: nnx.Rngs | None = None,
  fused: Fused = EMPTY,
  plan: str = AUTO,
  forwards: int = 1,
  projections: str = "made",
  stack_axis: int | None = None,
) -> nnx.Module:
  """Put an adapter on an nnx model, which is changed and returned.

  Its output stays the same until the adapter is trained: differentiate with
  respect to `nnx.LoRAParam`.

  Args:
    model: any nnx module, with its weights.
    adapter: from `vera_jax.vera`, `lora`, ...
    targets: patterns over "/"-joined paths, as for `vera_jax.adapt`; an entry
      of a list is part of its name, such as "layers_3/q_proj".
    rngs: for the leaves that start at random; `nnx.Rngs(0)` if there is none.
    fused, plan, forwards: as for `vera_jax.adapt`.
    projections: "made" makes what all layers share, such as VeRA's A and B,
      from its seed at each call of the model; "held" makes it once and holds
      it in fields of the model, as `Projection`, which nothing trains.
    stack_axis: as for `find_targets`.

  Raises:
    UserError: a target matches nothing that can be adapted, or the model has
      an adapter already.
  """
  if projections not in PROJECTIONS:
    raise UserError(
      f"projections is {projections!r}; choose from {', '.join(PROJECTIONS)}."
    )
  if not isinstance(model, nnx.Module):
    what = f"the class {model.__name__}" if isinstance(model, type) else model
    raise UserError(f"The model is {what!s}; give a module of flax.nnx.")
  check_choices(adapter, targets)
  twin, modules = twin_of(model), modules_of(model)
  if any(hasattr(type(module), UNADAPTED) for module in modules.values()):
    raise UserError(
      "The model has an adapter already: put both on at once, by"
      " chain(first, second)."
    )
  check_activations(model)
  sites = find_targets(model, targets, fused=fused, stack_axis=stack_axis)
  check_links(adapter, sites)
  patterns, plan = tuple(targets), check_plan(plan)
  adaptation = Adaptation(adapter, patterns, fused, plan, forwards, sites=sites)
  params = tree_of(model, sites=sites)
  matrices = make_shared(adapter, sites, params)
  key = (rngs or nnx.Rngs(0)).params()
  leaves = first_leaves(adapter, sites, params, matrices, key)
  check_biases(twin, adapter, sites, params, leaves, matrices)
  leaves, matrices = on_mesh_of(params, leaves), on_mesh_of(params, matrices)
  added: dict[Path, nnx.Variable] = {}
  for path, leaf in flatten_dict(leaves).items():
    added[path] = nnx.LoRAParam(stacked(leaf, sites.get(path[:-1])))
  for path, leaf in flatten_dict(matrices).items():
    if len(path) > 1 or projections == "held":
      added[path] = Projection(stacked(leaf, sites.get(path[:-1])))
  for path, site in sites.items() if adapter.is_random else ():
    if site.stack:
      numbers = jnp.arange(site.layers).reshape(*site.stack, 1)
      layer = layer_path(path, site)
      added[*layer, NUMBER] = Projection(stacked(numbers, site))
  for *path, name in added:
    if hasattr(modules.get(tuple(path)), name):
      raise UserError(
        f"{'/'.join(path) or 'The model'} has a field {name!r} already, which"
        f" {adapter.name} would need for a matrix of its own."
      )
  for path, variable, _ in variables_of(model):
    name = "/".join(twin.leaf(path)[0])
    if adapter.trains and find(adapter.trains, name):  # leaves of the base
      if is_quantised(value_of(variable)):
        raise UserError(f"{name} is quantised by qwix: it can't be trained.")
      added[path] = _as(nnx.LoRAParam, variable)
  for path, variable in added.items():
    if path[:-1] not in modules:
      modules[path[:-1]] = Part()
      setattr(modules[path[:-2]], path[-2], modules[path[:-1]])
    setattr(modules[path[:-1]], path[-1], variable)
  for path, site in sites.items():
    layer = layer_path(path, site)
    if PLACE not in vars(modules[layer]):  # of several parts the first one
      setattr(modules[layer], PLACE, "/".join(layer))
      base, kernel = type(modules[layer]), site.view.kernel
      modules[layer].__class__ = adaptation.derived(base, kernel)
  model.__class__ = adaptation.derived(type(model))
  return model


def on_mesh_of(params: Any, tree: Any) -> Any:
  """New leaves, replicated over the mesh on which a base lies, if on any; what
  was computed of its weights lies there already."""
  meshes = [
    leaf.sharding.mesh
    for leaf in jax.tree.leaves(params)
    if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    and not isinstance(leaf, jax.core.Tracer)
  ]

  def placed(leaf: Any) -> Any:
    if isinstance(getattr(leaf, "sharding", None), SingleDeviceSharding):
      return jax.device_put(leaf, NamedSharding(meshes[0], PartitionSpec()))
    return leaf

  return jax.tree.map(placed, tree) if meshes else tree


def find_targets(
  model: nnx.Module,
  targets: Sequence[str],
  *,
  fused: Fused = EMPTY,
  stack_axis: int | None = None,
) -> dict[Path, Target]:
  """The sites whose path ends in one of the patterns, as they were defined.

  Args:
    model: any nnx module.
    targets: patterns, as for `adapt`.
    fused: as for `vera_jax.adapt`.
    stack_axis: on which layers that `nnx.scan` runs are stacked, 0 or 1; it
      need not be given where the shapes of kernels and biases say it.

  Raises:
    UserError: a pattern matches nothing that can be adapted; the message lists
      what can be. Or the axis of a stack is to be given.
  """
  axes = STACK_AXES if stack_axis is None else (stack_axis,)
  readings: dict[Path, list[Target]] = {}
  unfit: Reasons = {}
  owners: dict[int, Path] = {}
  for path, module in modules_of(model).items():
    read = _readings(module, axes)
    if isinstance(read, str):
      unfit[path] = read
    elif read:
      readings[path] = read
      kernel = read[0].view.kernel
      other = owners.setdefault(id(vars(module)[kernel]), path)
      if other != path:
        unfit[path] = f"it shares its {kernel} with {'/'.join(other)}"
        unfit[other] = f"it shares its {kernel} with {'/'.join(path)}"
  # the axis of one layer tells those of others whose shapes fit either axis
  known = {x[0].axis for x in readings.values() if x[0].stack and len(x) == 1}
  layers = {
    path: next((site for site in read if known == {site.axis}), read[0])
    for path, read in readings.items()
    if path not in unfit
  }
  check_parts(fused, layers, unfit)
  chosen = choose(targets, with_parts(layers, fused), unfit, {}, {})
  for path, site in chosen.items():
    layer = layer_path(path, site)
    if len(readings[layer]) > 1 and len(known) != 1:
      raise UserError(
        f"The layers at {'/'.join(layer)} may be stacked on axis 0 or on axis 1"
        f" of their {site.view.kernel}: give stack_axis, which nnx.scan has as"
        " in_axes."
      )
  return chosen


def _readings(
  module: nnx.Module, axes: Sequence[int]
) -> list[Target] | str | None:
  """A layer, for each axis on which it may be stacked; or as `see` says."""
  readings: list[Target] = []
  for axis in axes:
    seen = see(module, type(module), axis)
    if not isinstance(seen, Seen):
      return seen
    params, kernel = values_of(module), seen.view.kernel
    shape, own = params[kernel].shape, seen.shape
    more = len(shape) - len(own)
    stack = shape[axis : axis + more]
    fits = (*shape[:axis], *shape[axis + more :]) == own and all(
      x.shape[min(axis, x.ndim - more) :][:more] == stack
      for x in params.values()
    )
    # where MaxText notes it
    noted = getattr(vars(module)[kernel], "param_scan_axis", axis)
    if fits and noted == axis:
      inputs, outputs = math.prod(seen.inputs), math.prod(seen.outputs)
      at = axis if stack else 0
      readings.append(Target(inputs, outputs, stack, None, seen.view, at))
  return list(dict.fromkeys(readings)) or (
    f"its {kernel} has the shape {shape}, and not {own} with the axis of a"
    f" stack at {' or '.join(map(str, axes))}"
  )


def stacked(value: Any, site: Target | None, *, front: bool = False) -> Any:
  """A value of a site with its stack on the axis where the model has it, of
  one that has it in front; or the other way round."""
  if site is None or not site.axis:
    return value
  more = len(site.stack)
  axis = min(site.axis, value.ndim - more)
  ends = range(more), range(axis, axis + more)
  moved = ends[::-1] if front else ends
  return jax.tree.map(lambda part: jnp.moveaxis(part, *moved), value)


def modules_of(model: nnx.Module) -> dict[Path, nnx.Module]:
  """Every module by its path, in the order in which they were defined.

  An entry of a list is part of a name: ("layers_3", "q_proj"). A model that
  has a linen twin here has the twin's paths. flax keeps the order of a model's
  fields when the model is taken apart and put together again.
  """

  def order(path: Sequence[Any]) -> list[int]:
    numbers: list[int] = []
    node: Any = model
    for part in path:
      names = list(getattr(node, "_pytree__nodes", node))
      is_entry = isinstance(part, int)
      numbers.append(part if is_entry else names.index(part))
      is_item = is_entry or not isinstance(node, nnx.Pytree)
      node = node[part] if is_item else vars(node)[part]
    return numbers

  twin, modules = twin_of(model), dict(nnx.iter_modules(model))
  return {twin.module(named(p)): modules[p] for p in sorted(modules, key=order)}


def named(path: Sequence[Any]) -> Path:
  """("layers", 3, "q_proj") -> ("layers_3", "q_proj")."""
  names: list[str] = []
  for part in path:
    if isinstance(part, int) and names:
      names[-1] = f"{names[-1]}_{part}"
    else:
      names.append(str(part))
  return tuple(names)


def variables_of(
  model: nnx.Module, sites: Mapping[Path, Target] | None = None
) -> Iterator[tuple[Path, Any, Target | None]]:
  """What holds parameters, an adapter's too: its path, the variable, and the
  site that it belongs to, of the model's adapter or of those that are given."""
  adaptation = getattr(type(model), ROOT, None)
  sites = adaptation.sites if adaptation else sites or {}
  # by the paths of the layers and parts that they are
  owners = {layer_path(path, site): site for path, site in sites.items()}
  owners |= sites
  for path, module in modules_of(model).items():
    for name, variable in vars(module).items():
      if value_of(variable) is not None:
        yield (*path, name), variable, owners.get(path)


def tree_of(
  model: nnx.Module,
  only: nnx.filterlib.Filter = ...,
  *,
  sites: Mapping[Path, Target] | None = None,
) -> dict[str, Any]:
  """The model's parameters as the tree of a linen model, with the adapter's.

  Args:
    model: with an adapter or without one.
    only: which variables are taken.
    sites: of a model without an adapter; their stacks are put in front.
  """
  is_taken = nnx.filterlib.to_predicate(only)
  return unflatten_dict(
    {
      path: stacked(value_of(variable), site, front=True)
      for path, variable, site in variables_of(model, sites)
      if is_taken(path, variable)
    }
  )


def set_values(model: nnx.Module, flat: Mapping[Path, Any]) -> None:
  """Give an adapted model's variables the values of a linen tree's leaves."""
  for path, variable, site in variables_of(model):
    if path in flat:
      variable.set_value(stacked(flat[path], site))


def adaptation_of(model: nnx.Module) -> Adaptation:
  """The adapter that a model has.

  Raises:
    UserError: it has none.
  """
  adaptation = getattr(type(model), ROOT, None)
  if adaptation is None:
    raise UserError("The model has no adapter: vera_jax.nnx.adapt puts one on.")
  return adaptation


def _values(
  module: nnx.Module | None, kind: type[nnx.Variable]
) -> dict[str, Any]:
  """The values of a kind that lie in a module itself."""
  return {
    name: variable.get_value()
    for name, variable in (vars(module) if module else {}).items()
    if isinstance(variable, kind)
  }


def _as(kind: type[nnx.Variable], variable: nnx.Variable) -> nnx.Variable:
  return kind(variable.get_value(), **variable.get_metadata())


def merge(model: nnx.Module) -> nnx.Module:
  """The plain model with the adapted weights; the adapted one stays as it is.

  It shares the other arrays with the adapted model, and is of its first class.

  Raises:
    UserError: the model has no adapter, or it is on layers that qwix quantised.
  """
  adaptation = adaptation_of(model)
  adapter, sites = adaptation.adapter, adaptation.sites
  flat = flatten_dict(tree_of(model, PARAMS))
  coded = {path for path, leaf in flat.items() if is_quantised(leaf)}
  for path, target in sites.items():
    layer = layer_path(path, target)
    if (*layer, target.view.kernel) in coded and adapter.weights:
      raise UserError(
        f"The kernel of {'/'.join(layer)} is quantised by qwix, and the adapted"
        " weights have no such codes. Save the adapter, load it on the plain"
        " model with the dequantised weights (qwix.dequantize), and merge that."
      )
  params = unflatten_dict({p: x for p, x in flat.items() if p not in coded})
  projections = projections_of(model)
  merged = merge_tree(params, projections, adapter=adapter, targets=sites)
  plain = nnx.clone(model)
  set_values(plain, flatten_dict(merged))
  return remove(plain)


def remove(model: nnx.Module) -> nnx.Module:
  """Take the adapter off the model, which is changed and returned.

  What a method trains of the base itself, as BitFit does, stays as trained.

  Raises:
    UserError: the model has no adapter.
  """
  owns = adaptation_of(model).adapter.owns
  for module in modules_of(model).values():
    module.__class__ = getattr(type(module), UNADAPTED, type(module))
    for name, value in list(vars(module).items()):
      is_leaf = isinstance(value, nnx.LoRAParam)
      if is_leaf and not owns(name):
        setattr(module, name, _as(nnx.Param, value))
      elif is_leaf or isinstance(value, Part | Projection) or name == PLACE:
        delattr(module, name)
  return model


def reference(model: nnx.Module) -> nnx.Module:
  """The adapted model as it is now, which training leaves as it is.

  It shares all arrays with the model but the trained ones.

  Raises:
    UserError: the model has no adapter.
  """
  adaptation_of(model)
  graph, trained, *rest = nnx.split(model, nnx.LoRAParam, ...)
  return nnx.merge(graph, jax.tree.map(jnp.copy, trained), *rest)


def projections_of(model: nnx.Module) -> dict[str, Any]:
  """The `projections` collection, as a linen model has it.

  Raises:
    UserError: the model has no adapter.
  """
  shared = adaptation_of(model).shared_at(model)
  tree = flatten_dict(tree_of(model, Projection))
  tree = {path: x for path, x in tree.items() if path[-1] != NUMBER}
  return unflatten_dict({(name,): x for name, x in shared.items()} | tree)
