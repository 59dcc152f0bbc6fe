"""What happens at the call of a layer that an adapter is on.

`apply.Adapted` runs its model under an `Interception`, which sees every call of
every layer: those of the targets' are made with the adapted weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.interface import Adapter, Leaves, Path, Site
from vera_jax.adapters.layer_calls import LayerCall, is_apart, is_own_call
from vera_jax.adapters.layers import place_of, see_call
from vera_jax.adapters.plans import FACTORED, WHOLE, Split, no_factored
from vera_jax.adapters.products import Weights, plus
from vera_jax.adapters.sites import (
  EVERY,
  Fused,
  arrays_at,
  is_on,
  matches,
  parts_of,
)
from vera_jax.errors import UserError
from vera_jax.operations.quantised import HALF, half_product, is_quantised

UNADAPTED = Adapter("unadapted")
PENALTIES = "penalties"  # the collection that methods sow their penalties into
KEYS = "adapter"  # the stream of random keys of methods that draw numbers


class Piece(NamedTuple):
  """Some columns of a layer's kernel: a site, or what lies between sites."""

  adapter: Adapter
  leaves: Leaves
  site: Site

  def links(self) -> Iterator[Adapter]:
    """The methods that are on it."""
    return (x for x in self.adapter.methods if is_on(x, self.site.path))


class Surrounding(NamedTuple):
  """A module that is running and has prepared what the layers in it need.

  Attributes:
    params, projections: the module's, as trees.
    ready: adapted weights of layers in it, by path.
    seen: (site, axes of its kernel) -> the site of a layer in it.
  """

  params: Any
  projections: Any
  ready: dict[Path, Weights]
  seen: Callable[[Site, int], Site]


class Special(NamedTuple):
  """A call that is no layer's product, but concerns those of layers.

  Attributes:
    kinds: classes of modules, and `method`: the name of theirs that is called.
    act: (interception, next_fun, args, kwargs, module) -> the call's output.
    inside: (module, args, kwargs) -> the path below which it says more of the
      layers, and their `tracing.Call` -> the same as it is then seen, or why
      that can't be adapted; None where it says nothing of layers in it.
  """

  kinds: type | tuple[type, ...]
  method: str
  act: Callable[..., Any]
  inside: Callable[..., tuple[Path, Callable[..., Any]]] | None = None


SPECIAL: list[Special] = []  # `kinds/` adds to it


def special_call(module: nn.Module, method: str) -> Special | None:
  """What is special about this call of a module's method, if anything is."""
  for special in SPECIAL:
    if method == special.method and isinstance(module, special.kinds):
      return special
  return None


@dataclasses.dataclass
class Interception:
  """One call of an adapted module, as `nn.intercept_methods` takes it.

  Attributes:
    adapter, targets, fused, plan, forwards, splits: as `apply.Adapted` has
      them.
    variables: the model's own and the adapter's.
    keyed: whether the call was given keys for methods that draw numbers.
    surroundings: the modules that are running and have prepared their layers.
  """

  adapter: Adapter
  targets: tuple[str, ...]
  fused: Fused
  plan: str
  forwards: int
  variables: Mapping[str, Any]
  keyed: bool
  splits: Mapping[Path, Split] = dataclasses.field(default_factory=dict)
  surroundings: dict[Path, Surrounding] = dataclasses.field(
    default_factory=dict
  )

  def __call__(self, next_fun, args, kwargs, context):
    """Interceptor: the layer's output, with adapted weights at its sites."""
    layer, method = context.module, context.method_name
    if is_own_call(layer) or is_apart(layer):
      return next_fun(*args, **kwargs)
    if special := special_call(layer, method):
      return special.act(self, next_fun, args, kwargs, layer)
    if method != "__call__":
      return next_fun(*args, **kwargs)
    params = self.params_of(layer)
    path = (*layer.path, *place_of(layer))
    quantised = any(map(is_quantised, params.values()))
    if not (quantised or self.is_adapted(path)):
      return next_fun(*args, **kwargs)
    # the model's own interceptors lie inside of this one
    intercepted = next_fun is not context.orig_method
    call = see_call(layer, params, args, kwargs, intercepted=intercepted)
    if not isinstance(call, LayerCall):
      return next_fun(*args, **kwargs)
    call = call._replace(site=call.site._replace(path=path))
    surrounding = self.surrounding_of(path)
    if surrounding is not None:
      if path in surrounding.ready:
        return with_weights(call, *surrounding.ready[path])
      axes = len(params[call.site.view.kernel].shape)
      call = call._replace(site=surrounding.seen(call.site, axes))
    remake = quantised and self.forwards == 1
    stored: Any = params[call.site.view.kernel]
    if quantised and not self.is_adapted(path) and call.plain:
      if stored.format == HALF:
        remake = False  # the product keeps the codes alone
        multiply = partial(_by_codes, codes=stored.codes)
        call = call._replace(site=call.site._replace(multiply=multiply))
    pieces = list(self.pieces_of(layer, call.site))
    keyed = self._has_keys(layer, call.site, pieces)
    y, penalties = self.product(
      call,
      pieces,
      remake=remake,
      draw=(lambda: layer.make_rng(KEYS)) if keyed else None,
    )
    for penalty in penalties:
      layer.sow(PENALTIES, "sum", penalty)
    return y

  def product(
    self,
    call: LayerCall,
    pieces: Sequence[Piece],
    *,
    remake: bool = False,
    draw: Callable[[], Array] | None = None,
  ) -> tuple[Any, list[Array]]:
    """(the layer's output, the methods' penalties).

    Args:
      call: of the layer.
      pieces: of its kernel.
      remake: as in `adapted_product`.
      draw: makes a key for methods that draw random numbers.

    Raises:
      UserError: numbers are to be drawn where the delta can only be folded.
    """
    folded_only = call.site.view.plans == ("folded",)
    draws = any(link.is_random for piece in pieces for link in piece.links())
    if draw and draws and folded_only:
      raise UserError(
        f"{'/'.join(call.site.path)} is a {call.site.view.kind} whose delta can"
        " only be folded into its kernel; a method that draws numbers in"
        " training, such as PVeRA, has none there. Choose another method, or"
        " leave the layer out of the targets."
      )
    if call.own_code is not None or (folded_only and len(pieces) > 1):
      return with_weights(call, *self.whole_weights(pieces)), []
    outputs, penalties = [], []
    for adapter, leaves, site in pieces:
      y, penalty = adapted_product(
        adapter,
        leaves,
        site,
        call.x,
        plan=self.plan,
        forwards=self.forwards,
        split=self.splits.get(site.path, WHOLE),
        remake=remake,
        key=draw() if draw and adapter.is_random else None,
      )
      if penalty is not None:
        penalties.append(penalty)
      outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
    return call.finish(y), penalties

  def _has_keys(
    self, layer: nn.Module, site: Site, pieces: Sequence[Piece]
  ) -> bool:
    """Whether random numbers can be drawn at a layer.

    Raises:
      UserError: they are to be, and a transformation keeps the keys from the
        layer.
    """
    keyed = self.adapter.is_random and layer.has_rng(KEYS)
    draws = any(link.is_random for piece in pieces for link in piece.links())
    name = "/".join(site.path)
    if self.keyed and draws and not keyed:
      raise UserError(
        f"{self.adapter.name} draws random numbers in training, which a"
        f" transformation keeps from {name}: have it pass them on,"
        f" such as nn.scan(..., split_rngs={{'params': True, {KEYS!r}: True}})."
      )
    return keyed

  def whole_weights(self, pieces: Sequence[Piece]) -> Weights:
    """A layer's adapted kernel (i, o) and bias, put together of its pieces.

    Raises:
      UserError: no kernel is to be made, since each row may have another.
    """
    kernels: list[Array] = []
    biases: list[Any] = []
    for piece in pieces:
      site, weights = piece.site, piece.adapter.weights
      kernel, bias = site.kernel(), site.bias
      if weights is not None:
        on = any(link.weights for link in piece.links())
        if on and self.plan == FACTORED:
          raise no_factored(site.path, site.view)
        kernel, bias = weights(piece.leaves, site)
      kernels.append(kernel)
      biases.append(bias)
    if len(pieces) == 1:
      return kernels[0], biases[0]
    bias = None if biases[0] is None else jnp.concatenate(biases)
    return jnp.concatenate(kernels, axis=-1), bias

  def pieces_of(self, layer: nn.Module, site: Site) -> Iterator[Piece]:
    """The pieces of a bound layer, whose whole is the site."""
    params = layer.variables.get("params", {})
    projections = self.projections_of(layer)
    for name in place_of(layer):  # its parts' leaves lie below it
      params, projections = params.get(name, {}), projections.get(name, {})
    return self.pieces(site, params, projections)

  def pieces(
    self, layer: Site, params: Any, projections: Any
  ) -> Iterator[Piece]:
    """The sites of a layer and what lies between them, column by column.

    Args:
      layer: the layer as one site.
      params: its parameters, those of its parts below it.
      projections: the collection's, from the layer on.

    Raises:
      UserError: the adapter has no leaves there; the base would run unadapted.
    """
    columns = self._columns(layer.path)
    shared = arrays_at(self.variables.get("projections", {}))
    common = self.adapter.own(arrays_at(self.variables["params"]))
    for name, (first, last) in _cut(columns, layer.outputs).items():
      part = (name,) if name in columns else ()
      adapted = bool(part) or self.is_target(layer.path)
      adapter = self.adapter if adapted else UNADAPTED
      site = layer._replace(
        path=(*layer.path, *part),
        shared={**shared, **arrays_at(projections, part)},
        common=common,
      )
      if (first, last) != (0, layer.outputs):
        site = site._replace(
          outputs=last - first,
          kernel=partial(_columns_of, layer.kernel, first, last),
          bias=None if layer.bias is None else layer.bias[first:last],
        )
      leaves = adapter.own(arrays_at(params, part))
      piece = Piece(adapter, leaves, site)
      if not leaves and any(link.init for link in piece.links()):
        raise UserError(
          f"The parameters have no leaves of {adapter.name} at"
          f" {'/'.join(site.path)}. Use those that the adapted module's init"
          " gives, or load an adapter."
        )
      yield piece

  def is_adapted(self, path: Path) -> bool:
    """Whether a layer, or a part of its kernel, is a target."""
    return self.is_target(path) or bool(self._columns(path))

  def _columns(self, path: Path) -> dict[str, tuple[int, int]]:
    """The parts of a layer's kernel that are targets."""
    return {
      name: span
      for name, span in parts_of(path, self.fused).items()
      if self.is_target((*path, name))
    }

  def is_target(self, path: Path) -> bool:
    patterns = self.targets
    if EVERY in patterns and not self._has_leaves(path):
      patterns = tuple(x for x in patterns if x != EVERY)
    return any(matches(pattern, path) for pattern in patterns)

  def _has_leaves(self, path: Path) -> bool:
    """Whether the adapter was made for a layer, or has nothing at any.

    The pattern for every layer leaves out those that can't be adapted."""
    if not (self.adapter.init or self.adapter.shared):
      return True
    leaves = self.adapter.own(arrays_at(self.variables["params"], path))
    projections = self.variables.get("projections", {})
    return bool(leaves or arrays_at(projections, path))

  def params_of(self, layer: nn.Module) -> dict[str, Any]:
    """A layer's own parameters, without the adapter's beside them."""
    params = arrays_at(layer.variables.get("params", {}))
    return {k: x for k, x in params.items() if not self.adapter.owns(k)}

  def surrounding_of(self, path: Path) -> Surrounding | None:
    """The running module that a path lies in and that has prepared it."""
    for outer, surrounding in self.surroundings.items():
      if path[: len(outer)] == outer:
        return surrounding
    return None

  def projections_of(self, layer: nn.Module) -> Any:
    """The projections at and below a layer, as a tree.

    A transformation passes on only the collections that it names. Where it
    names none, a layer whose parameters are not stacked, but shared by all of
    the transformation's steps, has its projections at its path in the tree of
    the whole model, or of the module around it.

    Raises:
      UserError: the layer is one of a stack, and it isn't known which.
    """
    if passed := layer.variables.get("projections"):
      return passed
    params, projections = (
      self.variables["params"],
      self.variables.get("projections", {}),
    )
    path = layer.path
    for outer, surrounding in self.surroundings.items():
      if path[: len(outer)] == outer:
        params, projections = surrounding.params, surrounding.projections
        path = path[len(outer) :]
        break
    projections = subtree(projections, path)
    ranks = [
      [jnp.ndim(x) for x in jax.tree.leaves(tree)]
      for tree in (layer.variables.get("params", {}), subtree(params, path))
    ]
    if projections and ranks[0] != ranks[1]:
      raise UserError(
        f"The layers at {'/'.join(layer.path)} are stacked, and"
        f" {self.adapter.name}"
        " has matrices of its own for each: have the transformation pass them"
        " on, such as nn.scan(..., variable_axes={'params': 0, 'projections':"
        " 0})."
      )
    return projections


def with_weights(call: LayerCall, kernel: Array, bias: Array | None) -> Any:
  """The layer's output with other weights."""
  kernel = kernel.astype(call.site.dtype)
  if call.own_code is not None:
    return call.own_code(kernel, bias)
  return call.finish(plus(call.site.multiply(call.x, kernel), bias))


def subtree(tree: Any, path: Path) -> Any:
  """What lies at a path of nested dictionaries; {} where nothing does."""
  for name in path:
    tree = tree.get(name, {})
  return tree


def _by_codes(x: Array, kernel: Array, *, codes: Array) -> Array:
  """x times a kernel in half precision, which is not made from its codes."""
  del kernel
  return half_product(x, codes)


def _columns_of(kernel: Callable[[], Array], first: int, last: int) -> Array:
  return kernel()[:, first:last]


def _cut(
  columns: Mapping[str, tuple[int, int]], outputs: int
) -> dict[str, tuple[int, int]]:
  """The named columns and, without a name in `columns`, what lies between."""
  pieces: dict[str, tuple[int, int]] = {}
  done = 0
  for name, (first, last) in sorted(columns.items(), key=lambda x: x[1]):
    if done < first:
      pieces[f"{done}:{first}"] = done, first
    pieces[name] = first, last
    done = last
  if done < outputs:
    pieces[f"{done}:{outputs}"] = done, outputs
  return pieces
