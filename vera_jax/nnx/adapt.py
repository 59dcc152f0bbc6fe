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
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from vera_jax.adapters.apply import check_choices, check_links
from vera_jax.adapters.intercept import Interception, Piece
from vera_jax.adapters.interface import (
  EMPTY,
  Adapter,
  Path,
  Site,
  Target,
)
from vera_jax.adapters.kinds.embed import table_site
from vera_jax.adapters.merge import merge as merge_tree
from vera_jax.adapters.plans import AUTO, check_plan
from vera_jax.adapters.sites import (
  EVERY,
  Fused,
  arrays_at,
  first_leaves,
  layer_path,
  make_shared,
  matches,
  parts_of,
)
from vera_jax.adapters.targets import check_parts
from vera_jax.errors import UserError
from vera_jax.nnx.layers import (
  OWNS,
  UNADAPTED,
  Projection,
  bare,
  see,
  see_call,
  values_of,
)
from vera_jax.nnx.twins import check_biases, twin_of
from vera_jax.patterns import find

ROOT = "adapted_by"  # the root's field with its `Adaptation`
PLACE = "adapted_at"  # an adapted layer's field with its path, a text
PROJECTIONS = ("made", "held")


class Part(nnx.Module):
  """The leaves of one part of a fused kernel."""


@dataclass(frozen=True, eq=False)
class Adaptation:
  """An adapter on a model: `adapters.apply.Adapted`'s fields, and the sites."""

  adapter: Adapter
  targets: tuple[str, ...]
  fused: Fused
  plan: str
  forwards: int
  sites: Mapping[Path, Target]

  def interception(self, root: nnx.Module | None) -> "_Calls":
    """What the model's layers need during a call of it.

    Args:
      root: the model; None where a layer is called alone.
    """
    if root is None and any(link.common for link in self.adapter.methods):
      raise UserError(
        f"{self.adapter.name} has leaves that all layers share, at the model's"
        " root: call the whole model, and not a layer of it."
      )
    common = {} if root is None else leaves_at(root, self.adapter)
    return _Calls(
      self.adapter,
      self.targets,
      self.fused,
      self.plan,
      self.forwards,
      {"params": common, "projections": self.shared_at(root)},
      _TRAINING.get() is not None,
      sites=self.sites,
    )

  def shared_at(self, root: nnx.Module | None) -> Mapping[str, Any]:
    """The projections of all layers: those that the model holds, or made anew
    from their seed."""
    held = {} if root is None else _values(root, Projection)
    if held or self.adapter.shared is None or self.adapter.from_base:
      return held
    return arrays_at(self.adapter.shared(self.sites))


@dataclass
class _Calls(Interception):
  """An interception that knows its sites by path."""

  sites: Mapping[Path, Target] = field(default_factory=dict)

  def is_target(self, path: Path) -> bool:
    return path in self.sites


class Training(NamedTuple):
  """A call of the model in training; see `training`."""

  key: Array
  penalties: list[Array]

  @property
  def penalty(self) -> Array:
    """The sum of what the methods add to the mean loss."""
    return (
      jnp.sum(jnp.stack(self.penalties)) if self.penalties else jnp.zeros(())
    )


_CALLS = ContextVar[_Calls | None]("calls", default=None)
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
  modules = modules_of(model)
  if any(hasattr(type(module), UNADAPTED) for module in modules.values()):
    raise UserError(
      "The model has an adapter already: put both on at once, by"
      " chain(first, second)."
    )
  sites = find_targets(model, targets, fused=fused)
  check_links(adapter, sites)
  adaptation = Adaptation(
    adapter, tuple(targets), fused, check_plan(plan), forwards, sites
  )
  params = tree_of(model)
  matrices = make_shared(adapter, sites, params)
  key = (rngs or nnx.Rngs(0)).params()
  leaves = first_leaves(adapter, sites, params, matrices, key)
  twin = twin_of(model)
  check_biases(twin, adapter, sites, params, leaves, matrices)
  added: dict[Path, nnx.Variable] = {}
  for path, leaf in flatten_dict(leaves).items():
    added[path] = nnx.LoRAParam(leaf)
  for path, leaf in flatten_dict(matrices).items():
    if len(path) > 1 or projections == "held":
      added[path] = Projection(leaf)
  for *path, name in added:
    if hasattr(modules.get(tuple(path)), name):
      raise UserError(
        f"{'/'.join(path) or 'The model'} has a field {name!r} already, which"
        f" {adapter.name} would need for a matrix of its own."
      )
  for path, variable in added.items():
    if path[:-1] not in modules:
      owner = modules[path[:-2]]
      modules[path[:-1]] = Part()
      setattr(owner, path[-2], modules[path[:-1]])
    setattr(modules[path[:-1]], path[-1], variable)
  for path, module in modules.items():  # what a method trains of the base
    for name in values_of(module):
      leaf = twin.leaf((*path, name))[0]
      if adapter.trains and find(adapter.trains, "/".join(leaf)):
        variable = vars(module)[name]
        trained = nnx.LoRAParam(variable.get_value(), **variable.get_metadata())
        setattr(module, name, trained)
  derived = cache(partial(_layer_class, adaptation))
  for path, target in sites.items():
    owner = modules[layer_path(path, target)]
    if PLACE not in vars(owner):  # of several parts the first one
      setattr(owner, PLACE, "/".join(layer_path(path, target)))
      owner.__class__ = derived(type(owner), target.view.kernel)
  model.__class__ = _root_class(adaptation, type(model))
  return model


def find_targets(
  model: nnx.Module, targets: Sequence[str], *, fused: Fused = EMPTY
) -> dict[Path, Target]:
  """The sites whose path ends in one of the patterns, as they were defined.

  Raises:
    UserError: a pattern matches nothing that can be adapted; the message lists
      what can be.
  """
  layers: dict[Path, Target] = {}
  every: dict[Path, Target] = {}  # with parts of layers
  unfit: dict[Path, str] = {}
  owners: dict[int, Path] = {}
  for path, module in modules_of(model).items():
    seen = see(module, type(module))
    if seen is None:
      continue
    if isinstance(seen, str):
      unfit[path] = seen
      continue
    view, shape, outputs = seen
    kernel = vars(module)[view.kernel]
    if (other := owners.setdefault(id(kernel), path)) != path:
      unfit[path] = f"it shares its {view.kernel} with {'/'.join(other)}"
      unfit[other] = f"it shares its {view.kernel} with {'/'.join(path)}"
      continue
    stack = kernel.shape[: len(kernel.shape) - len(shape)]
    if kernel.shape != (*stack, *shape):
      unfit[path] = (
        f"its {view.kernel} has the shape {kernel.shape}, and not"
        f" {shape} behind the axes of a stack"
      )
      continue
    site = Target(math.prod(shape) // outputs, outputs, stack, None, view)
    layers[path] = site
  layers = {path: site for path, site in layers.items() if path not in unfit}
  check_parts(fused, layers, unfit)
  for path, site in layers.items():
    every[path] = site
    for name, columns in parts_of(path, fused).items():
      width = columns[1] - columns[0]
      every[*path, name] = site._replace(outputs=width, columns=columns)
  chosen: set[Path] = set()
  for pattern in targets:
    named = {path for path in every if matches(pattern, path)}
    if pattern == EVERY:
      named = {path for path in named if not every[path].columns}
    wrong = {p: why for p, why in unfit.items() if matches(pattern, p)}
    if not named or (wrong and pattern != EVERY):
      reasons = "".join(f"\n  {'/'.join(p)}: {why}" for p, why in wrong.items())
      what = "matches what can't be adapted" if wrong else "matches no layer"
      listed = "\n  ".join("/".join(path) for path in every)
      raise UserError(
        f"The target pattern {pattern!r} {what}:{reasons}\nThe layers that can"
        f" be adapted are:\n  {listed}"
      )
    chosen |= named
  for path in sorted(chosen):
    if every[path].columns and path[:-1] in chosen:
      raise UserError(
        f"The targets name both {'/'.join(path[:-1])} and its part"
        f" {path[-1]!r}; name one of them."
      )
  return {path: site for path, site in every.items() if path in chosen}


def modules_of(model: nnx.Module) -> dict[Path, nnx.Module]:
  """Every module by its path, in the order in which they were defined.

  An entry of a list is part of a name: ("layers_3", "q_proj"). A model that
  has a linen twin here has the twin's paths.
  """
  by_parts = dict(nnx.iter_modules(model))

  def order(parts: Sequence[Any]) -> list[int]:
    numbers: list[int] = []
    node: Any = model
    for part in parts:
      children = node if isinstance(node, Mapping) else None
      if children is None and not isinstance(part, int):
        children = vars(node)
      numbers.append(part if children is None else list(children).index(part))
      node = node[part] if children is None else children[part]
    return numbers

  twin = twin_of(model)
  modules = {
    twin.module(named(p)): by_parts[p] for p in sorted(by_parts, key=order)
  }
  return {path: modules[path] for path in sorted(modules, key=twin.order)}


def named(path: Sequence[Any]) -> Path:
  """("layers", 3, "q_proj") -> ("layers_3", "q_proj")."""
  names: list[str] = []
  for part in path:
    if isinstance(part, int) and names:
      names[-1] = f"{names[-1]}_{part}"
    else:
      names.append(str(part))
  return tuple(names)


def tree_of(
  model: nnx.Module, *, without: type[nnx.Variable] | tuple[()] = ()
) -> dict[str, Any]:
  """The model's parameters as the tree of a linen model, with the adapter's."""
  flat: dict[Path, Any] = {}
  for path, module in modules_of(model).items():
    for name, variable in vars(module).items():
      if isinstance(variable, nnx.Param) and not isinstance(variable, without):
        flat[*path, name] = variable.get_value()
  return unflatten_dict(flat)


def leaves_at(module: nnx.Module, adapter: Adapter) -> dict[str, Any]:
  """The adapter's leaves beside a module's own parameters."""
  return {
    name: variable.get_value()
    for name, variable in vars(module).items()
    if isinstance(variable, nnx.LoRAParam) and adapter.owns(name)
  }


def adaptation_of(model: nnx.Module) -> Adaptation:
  """The adapter that a model has.

  Raises:
    UserError: it has none.
  """
  adaptation = getattr(type(model), ROOT, None)
  if adaptation is None:
    raise UserError("The model has no adapter: vera_jax.nnx.adapt puts one on.")
  return adaptation


def _root_class(adaptation: Adaptation, base: type) -> type:
  """The model's class, whose call gives its layers what they share."""

  @wraps(base.__call__)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _CALLS.set(adaptation.interception(self))
    try:
      return base.__call__(self, *args, **kwargs)
    finally:
      _CALLS.reset(token)

  return _derived(base, adaptation, {"__call__": call})


def _layer_class(adaptation: Adaptation, base: Any, kernel: str) -> type:
  """A layer's class, whose call makes the adapted product."""

  @wraps(base.__call__)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _call(self, base, adaptation, args, kwargs)

  def read(self: Any, name: str) -> Any:
    if name == kernel and _CALLS.get() is not None:
      raise UserError(
        f"The model reads the {kernel} of {vars(self)[PLACE]} itself, where it"
        " is not adapted. Leave the layer out of the targets."
      )
    return base.__getattribute__(self, name)

  body: dict[str, Any] = {"__call__": call, "__getattribute__": read}
  if issubclass(base, nnx.Embed):

    @wraps(base.attend)
    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
      return _attend(self, base, adaptation, args, kwargs)

    body["attend"] = attend
  return _derived(base, adaptation, body)


def _derived(
  base: type, adaptation: Adaptation, body: Mapping[str, Any]
) -> type:
  """A class of the same name, as whoever prints or compares it expects."""
  about = {
    ROOT: adaptation,
    UNADAPTED: base,
    OWNS: adaptation.adapter.owns,
    "__module__": base.__module__,
    "__qualname__": base.__qualname__,
    "__doc__": base.__doc__,
  }
  return type(base)(base.__name__, (base,), {**about, **body})


def _call(
  layer: Any, base: type, adaptation: Adaptation, args: Any, kwargs: Any
) -> Any:
  """A call of an adapted layer, wherever in the model it lies."""
  calls = _CALLS.get() or adaptation.interception(None)
  path = tuple(vars(layer)[PLACE].split("/"))
  call = see_call(layer, base, args, kwargs)
  if isinstance(call, str):
    raise UserError(f"{'/'.join(path)} can't be adapted in this call: {call}.")
  call = call._replace(site=call.site._replace(path=path))
  pieces = _pieces(calls, layer, call.site)
  training = _TRAINING.get()
  draw = None
  if training is not None and adaptation.adapter.is_random:
    if any(adaptation.sites[piece.site.path].stack for piece in pieces):
      raise UserError(
        f"{adaptation.adapter.name} draws random numbers in training, which"
        f" would be the same for all layers of the stack {'/'.join(path)}."
      )
    place_key = jax.random.fold_in(
      training.key, zlib.crc32("/".join(path).encode())
    )
    draw = lambda: place_key  # noqa: E731
  y, penalties = calls.product(call, pieces, draw=draw)
  if training is not None:
    training.penalties.extend(penalties)
  return y


def _attend(
  layer: Any, base: Any, adaptation: Adaptation, args: Any, kwargs: Any
) -> Any:
  """The tied output layer, by flax's own code on the adapted table."""
  calls = _CALLS.get() or adaptation.interception(None)
  table = values_of(layer)["embedding"]
  site = table_site(base.__name__, table)
  site = site._replace(path=tuple(vars(layer)[PLACE].split("/")))
  adapted, _ = calls.whole_weights(_pieces(calls, layer, site))
  changed = {"embedding": adapted.astype(table.dtype)}
  return base.attend(bare(layer, base, changed), *args, **kwargs)


def _pieces(calls: Interception, layer: nnx.Module, site: Site) -> list[Piece]:
  """The layer's sites, with their leaves and the matrices of their own."""
  trees: list[dict[str, Any]] = []
  for kind in (nnx.LoRAParam, Projection):
    tree: dict[str, Any] = {}
    for name, value in vars(layer).items():
      if isinstance(value, Part):
        tree[name] = _values(value, kind)
    trees.append({**tree, **_values(layer, kind)})
  return list(calls.pieces(site, *trees))


def _values(module: nnx.Module, kind: type[nnx.Variable]) -> dict[str, Any]:
  return {
    name: variable.get_value()
    for name, variable in vars(module).items()
    if isinstance(variable, kind)
  }


def merge(model: nnx.Module) -> nnx.Module:
  """The plain model with the adapted weights; the adapted one stays as it is.

  It shares the other arrays with the adapted model, and is of its first class.

  Raises:
    UserError: the model has no adapter.
  """
  adaptation = adaptation_of(model)
  params = tree_of(model, without=Projection)
  projections = projections_of(model)
  merged = flatten_dict(
    merge_tree(
      params,
      projections,
      adapter=adaptation.adapter,
      targets=adaptation.sites,
    )
  )
  plain = remove(nnx.clone(model))
  for path, module in modules_of(plain).items():
    for name, variable in vars(module).items():
      if (value := merged.get((*path, name))) is not None:
        variable.set_value(value)
  return plain


def remove(model: nnx.Module) -> nnx.Module:
  """Take the adapter off the model, which is changed and returned.

  What a method trains of the base itself, as BitFit does, stays as trained.

  Raises:
    UserError: the model has no adapter.
  """
  adapter = adaptation_of(model).adapter
  for module in modules_of(model).values():
    for name, value in list(vars(module).items()):
      if isinstance(value, nnx.LoRAParam) and not adapter.owns(name):
        plain = nnx.Param(value.get_value(), **value.get_metadata())
        setattr(module, name, plain)
    if (base := vars(type(module)).get(UNADAPTED)) is None:
      continue
    module.__class__ = base
    for name, value in list(vars(module).items()):
      is_leaf = isinstance(value, nnx.LoRAParam) and adapter.owns(name)
      if is_leaf or isinstance(value, Part | Projection) or name == PLACE:
        delattr(module, name)
  return model


def projections_of(model: nnx.Module) -> dict[str, Any]:
  """The `projections` collection, as a linen model has it.

  Raises:
    UserError: the model has no adapter.
  """
  shared = adaptation_of(model).shared_at(model)
  tree: dict[Path, Any] = {(name,): value for name, value in shared.items()}
  for path, module in modules_of(model).items():
    for name, value in _values(module, Projection).items():
      tree[*path, name] = value
  return unflatten_dict(tree)
