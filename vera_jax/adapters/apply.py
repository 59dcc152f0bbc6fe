"""Put an adapter on any linen model, from outside.

`adapt(model, adapter, targets=...)` is a linen module with the model's own
parameter tree, plus the adapter's leaves beside each adapted kernel and the
`projections` collection. The model's code is left alone: the calls of its
layers are intercepted by path.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, meta
from flax.core.scope import in_filter
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from vera_jax.adapters.interface import (
  EMPTY,
  Adapter,
  Leaves,
  Path,
  Site,
  Target,
  View,
)
from vera_jax.adapters.layers import (
  Product,
  flat_bias,
  flat_kernel,
  is_own_call,
  own_call,
  product_of,
)
from vera_jax.adapters.products import (
  AUTO,
  FACTORED,
  adapted_product,
  check_plan,
  choose,
)
from vera_jax.adapters.sites import (
  Fused,
  all_sites,
  arrays_at,
  first_leaves,
  is_on,
  layer_path,
  make_shared,
  map_sites,
  matches,
  own_leaves,
  parts_of,
  trace_sites,
)
from vera_jax.errors import UserError
from vera_jax.models.quantised import HALF, half_product, is_quantised

UNADAPTED = Adapter("unadapted")
PENALTIES = "penalties"  # the collection that methods sow their penalties into
KEYS = "adapter"  # the stream of random keys of methods that draw numbers


class _Call(NamedTuple):
  """One call of an adapted module.

  Attributes:
    shared, common: as every `Site` has them.
    cells: the recurrent cells that are running, and their projections.
    ready: adapted kernels and biases of these cells.
  """

  shared: Leaves
  common: Leaves
  cells: dict[Path, Any]
  ready: dict[Path, tuple[Array, Array | None]]

  def below(self, path: Path) -> Any:
    """The projections at and below a layer of a running cell, as a tree."""
    for cell, tree in self.cells.items():
      if path[: len(cell)] == cell:
        for name in path[len(cell) :]:
          tree = tree.get(name, {})
        return tree
    return {}


class Adapted(nn.Module):
  """A model and the adapter on it; made by `adapt`."""

  model: nn.Module
  adapter: Adapter
  targets: tuple[str, ...]
  fused: Fused
  plan: str
  forwards: int

  def setup(self) -> None:
    nn.share_scope(self, self.model)  # the base keeps its parameters' names

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    if self.is_initializing():  # `init` below has no need of this call
      raise UserError(
        "An adapted module can't be initialised inside another module: the"
        " adapter's leaves are made on a whole model's weights. Adapt the outer"
        " module instead: adapt(outer, adapter, targets=...)."
      )
    call = _Call(
      shared=arrays_at(self.variables.get("projections", {})),
      common=self.adapter.own(arrays_at(self.variables["params"])),
      cells={},
      ready={},
    )
    with nn.intercept_methods(partial(self._call_layer, call)):
      return self.model(*args, **kwargs)

  @nn.nowrap
  def _call_layer(self, call, next_fun, args, kwargs, context):
    """Interceptor: the layer's output, with adapted weights at its sites."""
    layer, method = context.module, context.method_name
    path = layer.path
    if is_own_call() or method not in ("__call__", "attend"):
      return next_fun(*args, **kwargs)
    if isinstance(layer, nn.RNN | nn.RNNCellBase):
      return self._call_cell(call, next_fun, args, kwargs, layer)
    own = layer.variables.get("params", {})  # parts of a kernel lie below it
    params = self._without_leaves(own)
    quantised = is_quantised(params.get("kernel"))
    if not (quantised or self._is_target(path) or self._columns(path)):
      return next_fun(*args, **kwargs)
    projections = layer.variables.get("projections", call.below(path))
    if method == "attend":
      at_layer = params, own, projections
      return self._attend(call, layer, at_layer, args, kwargs)
    product = product_of(layer, params, args, kwargs)
    if product is None or isinstance(product, str):
      return next_fun(*args, **kwargs)

    if path in call.ready:  # of a recurrent cell, from before its loop
      return _with_weights(product, *call.ready[path])
    random = self.adapter.is_random and layer.has_rng(KEYS)
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
    )
    pieces = list(self._pieces(call, whole, own, projections))
    folded_only = product.view.plans == ("folded",)
    if product.multiply is None or (folded_only and len(pieces) > 1):
      if random:
        product.project(product.x, kernel())  # which refuses it
      self._is_factored(pieces, product.rows)  # or refuses to be folded
      return _with_weights(product, *_weights(pieces))
    made = []
    for adapter, leaves, site in pieces:
      y, penalty = adapted_product(
        adapter,
        leaves,
        site,
        product.x,
        multiply=product.multiply,
        dtype=product.dtype,
        rows=product.rows,
        plan=self.plan,
        forwards=self.forwards,
        remake=remake,
        key=layer.make_rng(KEYS) if random and adapter.is_random else None,
      )
      if penalty is not None:
        layer.sow(PENALTIES, "sum", penalty)
      made.append(y)
    y = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    return product.finish(y)

  @nn.nowrap
  def _call_cell(self, call, next_fun, args, kwargs, layer):
    """A recurrent cell, or `nn.RNN` with one: its kernels are adapted once,
    outside the loop over time that is in here, and taken from `ready`."""
    cell = layer.cell if isinstance(layer, nn.RNN) else layer
    if cell.path in call.cells:
      return next_fun(*args, **kwargs)
    # nn.RNN passes on nothing but parameters, nor random keys
    call.cells[cell.path] = cell.variables.get("projections", {})
    random = self.adapter.is_random and layer.has_rng(KEYS)
    if random and isinstance(layer, nn.RNN):
      self._check_keys(layer, cell)
    ready = {}
    if self.plan != FACTORED and not random:
      given = jax.tree.leaves((args, kwargs))
      rows = max(x.size // x.shape[-1] for x in given if jnp.ndim(x))
      ready = self._ready(call, cell, rows)
    call.ready.update(ready)
    try:
      return next_fun(*args, **kwargs)
    finally:
      del call.cells[cell.path]
      for path in ready:
        del call.ready[path]

  @nn.nowrap
  def _ready(
    self, call: "_Call", cell: nn.Module, rows: int
  ) -> dict[Path, tuple[Array, Array | None]]:
    """The adapted kernels of two axes in a cell, where folding them is cheaper
    than two products per step."""
    plans: tuple[str, ...] = (FACTORED, "folded")
    if isinstance(cell, nn.OptimizedLSTMCell):  # all gates are one product
      plans = ("folded",)
    ready: dict[Path, tuple[Array, Array | None]] = {}
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
        view=View(plans=plans),
      )
      pieces = list(self._pieces(call, whole, own, call.below(path)))
      if not self._is_factored(pieces, rows):
        kernel, bias = _weights(pieces)
        ready[path] = kernel.astype(params["kernel"].dtype), bias
    return ready

  @nn.nowrap
  def _check_keys(self, layer: nn.RNN, cell: nn.Module) -> None:
    """Raises where `nn.RNN` would keep random keys from its cell."""
    passed = any(in_filter(names, KEYS) for names in layer.split_rngs)
    places = (p for p, _ in _layers_of(cell.variables.get("params", {})))
    if not passed and any(self._is_target((*cell.path, *p)) for p in places):
      raise UserError(
        f"{self.adapter.name} draws random numbers in training, which nn.RNN"
        f" keeps from its cell {'/'.join(cell.path)}: make it with split_rngs="
        f"{{'params': False, {KEYS!r}: True}}."
      )

  @nn.nowrap
  def _attend(self, call, layer, at_layer, args, kwargs):
    """`nn.Embed.attend`: the tied output layer has the adapted table too."""
    params, own, projections = at_layer
    table = params["embedding"]
    view = View(type(layer).__name__, "embedding", plans=("folded",))
    rows, width = table.shape
    whole = Site(layer.path, rows, width, lambda: table, view=view)
    pieces = list(self._pieces(call, whole, own, projections))
    self._is_factored(pieces, 1)  # or refuses to be folded
    adapted = {"embedding": _weights(pieces)[0].astype(table.dtype)}
    bare = layer.clone(parent=None, name=None)
    return own_call(bare, adapted, *args, method="attend", **kwargs)

  @nn.nowrap
  def _is_factored(
    self, pieces: Sequence[tuple[Adapter, Leaves, Site]], rows: int
  ) -> bool:
    """Whether one of a layer's deltas is best not made, by `choose`."""
    return FACTORED in [
      choose(
        rows,
        link.low_rank(link.own(leaves), site),
        plan=self.plan,
        forwards=self.forwards,
        view=site.view,
      )
      for adapter, leaves, site in pieces
      for link in adapter.methods
      if link.low_rank is not None and is_on(link, site.path)
    ]

  @nn.nowrap
  def _pieces(
    self, call: "_Call", whole: Site, own: Any, projections: Any
  ) -> Iterator[tuple[Adapter, Leaves, Site]]:
    """The sites of a layer and what lies between them, column by column.

    Args:
      call: of the adapted module.
      whole: the layer as one site.
      own: its parameters, those of its parts below it.
      projections: the collection's, from the layer on.
    """
    columns = self._columns(whole.path)
    for name, (first, last) in _cut(columns, whole.outputs).items():
      place = (name,) if name in columns else ()
      adapted = bool(place) or self._is_target(whole.path)
      adapter = self.adapter if adapted else UNADAPTED
      site = whole._replace(
        path=(*whole.path, *place),
        shared={**call.shared, **arrays_at(projections, place)},
        common=call.common,
      )
      if (first, last) != (0, whole.outputs):
        site = site._replace(
          outputs=last - first,
          kernel=partial(_columns_of, whole.kernel, first, last),
          bias=None if whole.bias is None else whole.bias[first:last],
        )
      found = arrays_at(own, place)
      yield adapter, self._leaves(adapter, found, site.path), site

  @nn.nowrap
  def _columns(self, path: Path) -> dict[str, tuple[int, int]]:
    """The parts of a layer's kernel that are targets."""
    return {
      name: span
      for name, span in parts_of(path, self.fused).items()
      if self._is_target((*path, name))
    }

  @nn.nowrap
  def _without_leaves(self, own: Any) -> dict[str, Any]:
    """A layer's own parameters, without the adapter's beside them."""
    found = arrays_at(own).items()
    return {name: x for name, x in found if not self.adapter.owns(name)}

  @nn.nowrap
  def _is_target(self, path: Path) -> bool:
    return any(matches(pattern, path) for pattern in self.targets)

  @nn.nowrap
  def _leaves(
    self, adapter: Adapter, found: Mapping[str, Any], path: Path
  ) -> Leaves:
    """The site's own leaves; without any, the base would run unadapted."""
    leaves = adapter.own(found)
    if adapter.init is not None and not leaves:
      raise UserError(
        f"The parameters have no leaves of {adapter.name} at {'/'.join(path)}."
        " Use those that the adapted module's init gives, or load an adapter."
      )
    return leaves

  @nn.nowrap
  def find_targets(self, *args: Any, **kwargs: Any) -> dict[Path, Target]:
    """The sites that the adapter is on, by path."""
    return find_targets(
      self.model, self.targets, *args, fused=self.fused, **kwargs
    )

  @nn.nowrap
  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module.init`, with the adapter's leaves among the `params` and
    the collection `projections`, made on the model's own first weights."""
    variables = dict(self.model.init(rngs, *args, **kwargs))
    key = rngs["params"] if isinstance(rngs, Mapping) else rngs
    targets = self.find_targets(*args, **kwargs) if self.targets else {}
    params = variables["params"]
    projections = make_shared(self.adapter, targets, params)
    leaves = first_leaves(self.adapter, targets, params, projections, key)
    variables["params"] = unflatten_dict(
      flatten_dict(params) | flatten_dict(leaves)
    )
    return variables | ({"projections": projections} if projections else {})

  @nn.nowrap
  def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """(output, variables): as `nn.Module.init_with_output`, by `init`."""
    variables = self.init(rngs, *args, **kwargs)
    keys = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
    output, _ = self.apply(variables, *args, rngs=keys, mutable=True, **kwargs)
    return output, variables


def _weights(
  pieces: Sequence[tuple[Adapter, Leaves, Site]],
) -> tuple[Array, Array | None]:
  """A layer's adapted kernel (i, o) and bias, put together of its pieces."""
  kernels: list[Array] = []
  biases: list[Any] = []
  for adapter, leaves, site in pieces:
    kernel, bias = site.kernel(), site.bias
    if adapter.weights is not None:
      kernel, bias = adapter.weights(leaves, site)
    kernels.append(kernel)
    biases.append(bias)
  if len(pieces) == 1:
    return kernels[0], biases[0]
  bias = None if biases[0] is None else jnp.concatenate(biases)
  return jnp.concatenate(kernels, axis=-1), bias


def _with_weights(product: Product, kernel: Array, bias: Array | None) -> Any:
  """The layer's output with other weights; or these, where it hands them on."""
  kernel = kernel.astype(product.dtype)
  if product.multiply is None:
    return kernel, bias
  y = product.multiply(product.x, kernel)
  if bias is not None:
    y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return product.finish(y)


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


def adapt(
  model: nn.Module,
  adapter: Adapter,
  *,
  targets: Sequence[str],
  fused: Fused = EMPTY,
  plan: str = AUTO,
  forwards: int = 1,
) -> Adapted:
  """Wrap a linen model, unchanged, with an adapter at the matching layers.

  The result is used as the model is; its `init` adds the adapter's leaves and
  the `projections` collection, its output equals the model's until the adapter
  is trained.

  Args:
    model: any linen module, unbound.
    adapter: from `vera`, `lora`, ...
    targets: patterns as in `find_targets`.
    fused: parts of fused kernels, which targets may then name: by a layer's
      pattern, each part's first and last column by name.
    plan: how low-rank deltas are multiplied, a name in `products.PLANS`, or
      "auto": the cheapest for each shape.
    forwards: how often a training step runs the forward pass; 2 under remat.
  """
  if isinstance(targets, str):
    raise UserError(f"targets is {targets!r}; give a list of patterns.")
  fixed: Any = FrozenDict({key: dict(parts) for key, parts in fused.items()})
  return Adapted(
    model, adapter, tuple(targets), fixed, check_plan(plan), forwards
  )


def find_targets(
  model: nn.Module,
  patterns: Sequence[str],
  *args: Any,
  fused: Fused = EMPTY,
  **kwargs: Any,
) -> dict[Path, Target]:
  """The sites whose path ends in one of the patterns.

  Args:
    model: any linen module, unbound.
    patterns: regular expressions over "/"-joined paths; "query" matches every
      path that ends in the name `query`.
    *args: example inputs (arrays or `jax.ShapeDtypeStruct`); nothing is
      computed on them.
    fused: as in `adapt`.
    **kwargs: keyword arguments of the model's call.

  Raises:
    UserError: a pattern matches no site; the message lists those there are.
  """
  return trace_sites(model, patterns, *args, fused=fused, **kwargs)[0]


def leaf_shapes(adapter: Adapter, path: Path, target: Target) -> dict[str, Any]:
  """The shapes of a site's leaves by name, with its stack's axes."""
  shapes = _leaf_shapes(adapter, {path: target})
  return dict(arrays_at(shapes, path))


def adapter_size(adapter: Adapter, targets: Mapping[Path, Target]) -> int:
  """Trained numbers of an adapter on these sites, counted from shapes."""
  leaves = jax.tree.leaves(_leaf_shapes(adapter, targets))
  return sum(math.prod(leaf.shape) for leaf in leaves)


def plans_at(
  adapter: Adapter,
  targets: Mapping[Path, Target],
  tokens: Mapping[Path, int],
  *,
  plan: str = AUTO,
  forwards: int = 1,
) -> dict[Path, str]:
  """How each low-rank delta multiplies, from shapes alone.

  Args:
    adapter: the method; sites where it has no low-rank delta are left out.
    targets: the sites.
    tokens: rows of x at each.
    plan, forwards: as for `adapt`.

  Raises:
    UserError: the method can't be multiplied by this plan.
  """
  chosen: dict[Path, str] = {}
  views = {path: target.view for path, target in targets.items()}
  targets = _matrices(targets)

  def choose_at(site: Site, leaves: Leaves) -> None:
    for link in adapter.methods:
      if link.low_rank is None or not is_on(link, site.path):
        continue
      if (
        link.forward is not None and link.draws
      ):  # so it is in training, which draws numbers
        chosen[site.path] = "factored"
      else:
        chosen[site.path] = choose(
          tokens[site.path],
          link.low_rank(link.own(leaves), site),
          plan=plan,
          forwards=forwards,
          view=views[site.path],
        )

  def note(params: Any) -> None:
    projections = make_shared(adapter, targets, params)
    key = jax.random.key(0)
    own = first_leaves(adapter, targets, params, projections, key)
    whole = unflatten_dict(flatten_dict(params) | flatten_dict(own))
    sites = all_sites(adapter, targets, whole, projections)
    leaves = own_leaves(adapter, sites, whole)
    map_sites(choose_at, sites, projections, leaves)

  jax.eval_shape(note, _layer_shapes(targets))
  return chosen


def _leaf_shapes(adapter: Adapter, targets: Mapping[Path, Target]) -> Any:
  """The tree of all leaves, as shapes, on layers of the targets' widths."""
  targets = _matrices(targets)

  def start(params: Any) -> Any:
    projections = make_shared(adapter, targets, params)
    key = jax.random.key(0)
    return first_leaves(adapter, targets, params, projections, key)

  return jax.eval_shape(start, _layer_shapes(targets))


def _matrices(targets: Mapping[Path, Target]) -> dict[Path, Target]:
  """The sites as if all kernels were stored as matrices."""
  return {
    path: target._replace(view=target.view._replace(kernel="kernel", axes=()))
    for path, target in targets.items()
  }


def _layer_shapes(targets: Mapping[Path, Target]) -> dict[str, Any]:
  """The shapes of kernels and biases that have these sites."""
  shapes: dict[Path, Any] = {}
  for path, target in targets.items():
    outputs = target.columns[1] if target.columns else target.outputs
    for name, shape in (
      ("kernel", (*target.stack, target.inputs, outputs)),
      ("bias", (*target.stack, outputs)),
    ):
      place = (*layer_path(path, target), name)
      if place not in shapes or shapes[place].shape[-1] < outputs:
        shapes[place] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return unflatten_dict(shapes)
