"""What happens at the call of a layer that an adapter is on.

`apply.Adapted` runs its model under an `Interception`, which sees every call of
every layer: those of the targets' are made with the adapted weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import in_filter
from jax import Array

from vera_jax.adapters.interface import Adapter, Leaves, Path, Site, View
from vera_jax.adapters.layer_calls import (
  Product,
  bound_call,
  is_apart,
  is_own_call,
)
from vera_jax.adapters.layers import (
  cell_rows,
  flat_bias,
  flat_kernel,
  in_cell,
  place_of,
  product_of,
)
from vera_jax.adapters.plans import FACTORED, choose, no_factored
from vera_jax.adapters.products import adapted_product, plus
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
Weights = tuple[Array, Array | None]
Piece = tuple[Adapter, Leaves, Site]


@dataclasses.dataclass
class Interception:
  """One call of an adapted module, as `nn.intercept_methods` takes it.

  Attributes:
    adapter, targets, fused, plan, forwards: as `apply.adapt` has them.
    variables: the model's own and the adapter's.
    keyed: whether the call was given keys for methods that draw numbers.
    cells: the recurrent cells that are running, and their variables.
    ready: adapted kernels and biases of these cells.
  """

  adapter: Adapter
  targets: tuple[str, ...]
  fused: Fused
  plan: str
  forwards: int
  variables: Mapping[str, Any]
  keyed: bool
  cells: dict[Path, Any] = dataclasses.field(default_factory=dict)
  ready: dict[Path, Weights] = dataclasses.field(default_factory=dict)

  def __call__(self, next_fun, args, kwargs, context):
    """Interceptor: the layer's output, with adapted weights at its sites."""
    layer, method = context.module, context.method_name
    attends = method == "attend" and isinstance(layer, nn.Embed)
    if is_own_call(layer) or is_apart(layer):
      return next_fun(*args, **kwargs)
    if not (method == "__call__" or attends):
      return next_fun(*args, **kwargs)
    if isinstance(layer, nn.RNN | nn.RNNCellBase):
      return self._call_cell(next_fun, args, kwargs, layer)
    own = layer.variables.get("params", {})  # parts of a kernel lie below it
    params = self._without_leaves(own)
    place = place_of(layer)
    path = (*layer.path, *place)
    quantised = is_quantised(params.get("kernel"))
    if not (quantised or self._is_target(path) or self._columns(path)):
      return next_fun(*args, **kwargs)
    projections = self._projections(layer)
    for name in place:
      own, projections = own.get(name, {}), projections.get(name, {})
    if attends:
      at_layer = params, own, projections
      return self._attend(layer, at_layer, args, kwargs)
    # the model's own interceptors lie inside of this one
    intercepted = next_fun is not context.orig_method
    product = product_of(layer, params, args, kwargs, intercepted=intercepted)
    if product is None or isinstance(product, str):
      return next_fun(*args, **kwargs)

    if path in self.ready:  # of a recurrent cell, from before its loop
      return _with_weights(product, *self.ready[path])
    inside = self._cell_of(path) is not None
    if inside and len(params[product.view.kernel].shape) == 2:
      product = product._replace(view=in_cell(product.view))
    remake = quantised and self.forwards == 1
    stored: Any = params[product.view.kernel]
    half = quantised and product.plain and stored.format == HALF
    if half and not (self._is_target(path) or self._columns(path)):
      remake = False  # it keeps the codes alone
      product = product._replace(
        multiply=lambda x, _: half_product(x, stored.codes)
      )

    def kernel() -> Array:
      whole = flat_kernel(params, (), product.outputs, product.view)
      return whole.astype(product.dtype)

    whole = Site(
      path,
      product.inputs,
      product.outputs,
      kernel,
      product.bias,
      view=product.view,
      project=product.project,
      multiply=product.multiply,
      dtype=product.dtype,
      rows=product.rows,
    )
    pieces = list(self._pieces(whole, own, projections))
    keyed = self.adapter.is_random and layer.has_rng(KEYS)
    if self.keyed and not keyed and _draw(pieces):
      raise UserError(
        f"{self.adapter.name} draws random numbers in training, which a"
        f" transformation keeps from {'/'.join(path)}: have it pass them on,"
        f" such as nn.scan(..., split_rngs={{'params': True, {KEYS!r}: True}})."
      )
    folded_only = product.view.plans == ("folded",)
    if folded_only and keyed and _draw(pieces):
      raise UserError(
        f"{'/'.join(path)} is a {product.view.kind} whose delta can only be"
        " folded into its kernel; a method that draws numbers in training, such"
        " as PVeRA, has none there. Choose another method, or leave the layer"
        " out of the targets."
      )
    if product.call is not None or (folded_only and len(pieces) > 1):
      return _with_weights(product, *self._whole(pieces))
    made = []
    for adapter, leaves, site in pieces:
      y, penalty = adapted_product(
        adapter,
        leaves,
        site,
        product.x,
        plan=self.plan,
        forwards=self.forwards,
        remake=remake,
        key=layer.make_rng(KEYS) if keyed and adapter.is_random else None,
      )
      if penalty is not None:
        layer.sow(PENALTIES, "sum", penalty)
      made.append(y)
    y = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    return product.finish(y)

  def _call_cell(self, next_fun, args, kwargs, layer):
    """A recurrent cell, or `nn.RNN` with one: its kernels are adapted once per
    call of this, and taken from `ready`. That is outside the loop over time of
    `nn.RNN`, but inside `nn.scan(nn.LSTMCell)`, whose steps are the calls."""
    cell = layer.cell if isinstance(layer, nn.RNN) else layer
    if self._cell_of(cell.path) is not None:  # or of one that it is a part of
      return next_fun(*args, **kwargs)
    # nn.RNN passes on nothing but parameters, nor random keys
    own = cell.variables.get("params", {})
    projections = self._projections(cell)
    self.cells[cell.path] = {"params": own, "projections": projections}
    keyed = self.adapter.is_random and layer.has_rng(KEYS)
    if keyed and isinstance(layer, nn.RNN):
      self._check_keys(layer, cell)
    ready = {}
    if self.plan != FACTORED:
      ready = self._ready(cell, cell_rows(args, kwargs), keyed=keyed)
    self.ready.update(ready)
    try:
      return next_fun(*args, **kwargs)
    finally:
      del self.cells[cell.path]
      for path in ready:
        del self.ready[path]

  def _ready(
    self, cell: nn.Module, rows: int, *, keyed: bool
  ) -> dict[Path, Weights]:
    """The adapted kernels of two axes in a cell, where folding them is cheaper
    than two products per step, and no random numbers are drawn (`keyed`)."""
    view = in_cell(View())
    if isinstance(cell, nn.OptimizedLSTMCell):  # all gates are one product
      view = view._replace(plans=("folded",))
    ready: dict[Path, Weights] = {}
    for place, own in _layers_of(cell.variables.get("params", {})):
      path = (*cell.path, *place)
      if not (self._is_target(path) or self._columns(path)):
        continue
      params = self._without_leaves(own)
      inputs, outputs = params["kernel"].shape
      whole = Site(
        path,
        inputs,
        outputs,
        partial(flat_kernel, params, (), outputs),
        flat_bias(params, ()),
        view=view,
      )
      projections = _subtree(self.cells[cell.path]["projections"], place)
      pieces = list(self._pieces(whole, own, projections))
      drawn = keyed and _draw(pieces)
      if not drawn and not self._is_factored(pieces, rows):
        kernel, bias = self._whole(pieces)
        ready[path] = kernel.astype(params["kernel"].dtype), bias
    return ready

  def _check_keys(self, layer: nn.RNN, cell: nn.Module) -> None:
    """Raises where `nn.RNN` would keep random keys from its cell."""
    passed = any(in_filter(names, KEYS) for names in layer.split_rngs)
    places = (
      (*cell.path, *place)
      for place, _ in _layers_of(cell.variables.get("params", {}))
    )
    drawn = any(
      self._is_target(path) and link.is_random and is_on(link, path)
      for path in places
      for link in self.adapter.methods
    )
    if drawn and not passed:
      raise UserError(
        f"{self.adapter.name} draws random numbers in training, which nn.RNN"
        f" keeps from its cell {'/'.join(cell.path)}: make it with split_rngs="
        f"{{'params': False, {KEYS!r}: True}}."
      )

  def _attend(self, layer, at_layer, args, kwargs):
    """`nn.Embed.attend`: the tied output layer has the adapted table too."""
    params, own, projections = at_layer
    table = params["embedding"]
    view = View(type(layer).__name__, "embedding", plans=("folded",))
    rows, width = table.shape
    whole = Site(layer.path, rows, width, lambda: table, view=view)
    pieces = list(self._pieces(whole, own, projections))
    adapted = {"embedding": self._whole(pieces)[0].astype(table.dtype)}
    return bound_call(layer, adapted, lambda e: e.attend(*args, **kwargs))

  def _is_factored(self, pieces: Sequence[Piece], rows: int) -> bool:
    """Whether one of a layer's deltas is best not made, by `choose`."""
    return FACTORED in [
      choose(
        rows,
        link.low_rank(link.own(leaves), site),
        plan=self.plan,
        forwards=self.forwards,
        view=site.view,
        path=site.path,
      )
      for adapter, leaves, site in pieces
      for link in adapter.methods
      if link.low_rank is not None and is_on(link, site.path)
    ]

  def _whole(self, pieces: Sequence[Piece]) -> Weights:
    """A layer's adapted kernel (i, o) and bias, put together of its pieces.

    Raises:
      UserError: no kernel is to be made, since each row may have another.
    """
    kernels: list[Array] = []
    biases: list[Any] = []
    for adapter, leaves, site in pieces:
      kernel, bias = site.kernel(), site.bias
      if adapter.weights is not None:
        on = any(
          link.weights and is_on(link, site.path) for link in adapter.methods
        )
        if on and self.plan == FACTORED:
          raise no_factored(site.path, site.view)
        kernel, bias = adapter.weights(leaves, site)
      kernels.append(kernel)
      biases.append(bias)
    if len(pieces) == 1:
      return kernels[0], biases[0]
    bias = None if biases[0] is None else jnp.concatenate(biases)
    return jnp.concatenate(kernels, axis=-1), bias

  def _pieces(self, whole: Site, own: Any, projections: Any) -> Iterator[Piece]:
    """The sites of a layer and what lies between them, column by column.

    Args:
      whole: the layer as one site.
      own: its parameters, those of its parts below it.
      projections: the collection's, from the layer on.
    """
    columns = self._columns(whole.path)
    shared = arrays_at(self.variables.get("projections", {}))
    common = self.adapter.own(arrays_at(self.variables["params"]))
    for name, (first, last) in _cut(columns, whole.outputs).items():
      place = (name,) if name in columns else ()
      adapted = bool(place) or self._is_target(whole.path)
      adapter = self.adapter if adapted else UNADAPTED
      site = whole._replace(
        path=(*whole.path, *place),
        shared={**shared, **arrays_at(projections, place)},
        common=common,
      )
      if (first, last) != (0, whole.outputs):
        site = site._replace(
          outputs=last - first,
          kernel=partial(_columns_of, whole.kernel, first, last),
          bias=None if whole.bias is None else whole.bias[first:last],
        )
      found = arrays_at(own, place)
      yield adapter, self._leaves(adapter, found, site.path), site

  def _columns(self, path: Path) -> dict[str, tuple[int, int]]:
    """The parts of a layer's kernel that are targets."""
    return {
      name: span
      for name, span in parts_of(path, self.fused).items()
      if self._is_target((*path, name))
    }

  def _without_leaves(self, own: Any) -> dict[str, Any]:
    """A layer's own parameters, without the adapter's beside them."""
    found = arrays_at(own).items()
    return {name: x for name, x in found if not self.adapter.owns(name)}

  def _is_target(self, path: Path) -> bool:
    patterns = self.targets
    if EVERY in patterns and not self._has_leaves(path):
      patterns = tuple(x for x in patterns if x != EVERY)
    return any(matches(pattern, path) for pattern in patterns)

  def _has_leaves(self, path: Path) -> bool:
    """Whether the adapter was made for a layer, or has nothing at any.

    The pattern for every layer leaves out those that can't be adapted."""
    if not (self.adapter.init or self.adapter.shared):
      return True
    own = self.adapter.own(arrays_at(self.variables["params"], path))
    return bool(own or arrays_at(self.variables.get("projections", {}), path))

  def _leaves(
    self, adapter: Adapter, found: Mapping[str, Any], path: Path
  ) -> Leaves:
    """The site's own leaves; without any, the base would run unadapted."""
    leaves = adapter.own(found)
    if not leaves and any(x.init and is_on(x, path) for x in adapter.methods):
      raise UserError(
        f"The parameters have no leaves of {adapter.name} at {'/'.join(path)}."
        " Use those that the adapted module's init gives, or load an adapter."
      )
    return leaves

  def _cell_of(self, path: Path) -> Path | None:
    """The running recurrent cell that a path lies in."""
    running = (cell for cell in self.cells if path[: len(cell)] == cell)
    return next(running, None)

  def _projections(self, layer: nn.Module) -> Any:
    """The projections at and below a layer, as a tree.

    A transformation passes on only the collections that it names. Where it
    names none, a layer whose parameters are not stacked, but shared by all of
    the transformation's steps, has its projections at its path in the tree of
    the whole model, or of the running cell.

    Raises:
      UserError: the layer is one of a stack, and it isn't known which.
    """
    if passed := layer.variables.get("projections"):
      return passed
    variables, place = self.variables, layer.path
    if (cell := self._cell_of(place)) is not None:
      variables, place = self.cells[cell], place[len(cell) :]
    whole = _subtree(variables.get("projections", {}), place)
    own = layer.variables.get("params", {})
    if whole and _axes(own) != _axes(_subtree(variables["params"], place)):
      raise UserError(
        f"The layers at {'/'.join(layer.path)} are stacked, and"
        f" {self.adapter.name}"
        " has matrices of its own for each: have the transformation pass them"
        " on, such as nn.scan(..., variable_axes={'params': 0, 'projections':"
        " 0})."
      )
    return whole


def _subtree(tree: Any, path: Path) -> Any:
  for name in path:
    tree = tree.get(name, {})
  return tree


def _axes(params: Any) -> list[int]:
  return list(map(jnp.ndim, jax.tree.leaves(params)))


def _draw(pieces: Sequence[Piece]) -> bool:
  """Whether a method that is on one of the pieces draws random numbers."""
  return any(
    link.is_random and is_on(link, site.path)
    for adapter, _, site in pieces
    for link in adapter.methods
  )


def _with_weights(product: Product, kernel: Array, bias: Array | None) -> Any:
  """The layer's output with other weights."""
  kernel = kernel.astype(product.dtype)
  if product.call is not None:
    return product.call(kernel, bias)
  return product.finish(plus(product.multiply(product.x, kernel), bias))


def _layers_of(params: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
  """The layers in a tree with a kernel of two axes: places and parameters."""
  for name, below in params.items():
    if name == "kernel" and meta.unbox(below).ndim == 2:
      yield (), params
    elif isinstance(below, Mapping):
      yield from (((name, *place), own) for place, own in _layers_of(below))


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
