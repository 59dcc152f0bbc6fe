"""Recurrent cells: their kernels are adapted once per call, not once per step.

`nn.RNN` loops over time, and in each step its cell multiplies with the same
kernels. So the deltas are folded before the loop, where that is cheaper than
two thin products in each step. The call of `nn.scan(nn.LSTMCell)` is a step's
own: there a delta is made in each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import in_filter
from flax.linen.recurrent import DenseParams
from jax import Array

from vera_jax.adapters.intercept import (
  KEYS,
  SPECIAL,
  Interception,
  Special,
  Surrounding,
  subtree,
)
from vera_jax.adapters.interface import Path, View
from vera_jax.adapters.layer_calls import LayerCall, Params
from vera_jax.adapters.layers import KINDS, Kind, flat_bias, site_of
from vera_jax.adapters.plans import FACTORED, choose
from vera_jax.adapters.products import Weights
from vera_jax.adapters.sites import is_on
from vera_jax.errors import UserError


def _see_gates(
  layer: Any, params: Params, *args: Any, **kwargs: Any
) -> tuple[View, int]:
  view = View(type(layer).__name__, plans=("folded",))
  return view, params["kernel"].shape[1]


def _call_gates(layer: Any, params: Params, inputs: Array) -> LayerCall:
  """`DenseParams`, the gates of `nn.OptimizedLSTMCell`: (kernel, bias) is what
  they return, so that a delta can only be folded into it."""
  site = site_of(
    params,
    *_see_gates(layer, params),
    dtype=params["kernel"].dtype,
    bias=params.get("bias"),
    rows=inputs.size // inputs.shape[-1],
  )
  return LayerCall(site, inputs, own_code=lambda kernel, bias: (kernel, bias))


def _call_cell(
  interception: Interception, next_fun: Any, args: Any, kwargs: Any, layer: Any
) -> Any:
  """A recurrent cell, or `nn.RNN` with one."""
  cell = layer.cell if isinstance(layer, nn.RNN) else layer
  if interception.surrounding_of(cell.path):  # or of one that it is a part of
    return next_fun(*args, **kwargs)
  # nn.RNN passes on nothing but parameters, nor random keys
  running = Surrounding(
    cell.variables.get("params", {}),
    interception.projections_of(cell),
    {},
    lambda site, axes: _in_cell(site) if axes == 2 else site,
  )
  keyed = interception.adapter.is_random and layer.has_rng(KEYS)
  if keyed and isinstance(layer, nn.RNN):
    _check_keys(interception, layer, cell)
  if interception.plan != FACTORED:
    rows = _rows(args, kwargs)
    running.ready.update(_ready(interception, cell, running, rows, keyed=keyed))
  interception.surroundings[cell.path] = running
  try:
    return next_fun(*args, **kwargs)
  finally:
    del interception.surroundings[cell.path]


def _ready(
  interception: Interception,
  cell: nn.Module,
  running: Surrounding,
  rows: int,
  *,
  keyed: bool,
) -> Iterator[tuple[Path, Weights]]:
  """The adapted weights of a cell's layers, where folding them is cheaper than
  two products per step, and no random numbers are drawn (`keyed`)."""
  view = View(plans=("factored", "folded"))
  if isinstance(cell, nn.OptimizedLSTMCell):  # all gates are one product
    view = view._replace(plans=("folded",))
  for below, leaves in _layers_of(running.params):
    path = (*cell.path, *below)
    if not interception.is_adapted(path):
      continue
    kernel = meta.unbox(leaves["kernel"])
    params = {"kernel": kernel, **_bias_of(leaves)}
    site = site_of(
      params,
      view,
      kernel.shape[1],
      dtype=kernel.dtype,
      bias=flat_bias(params, ()),
      rows=rows,
    )
    projections = subtree(running.projections, below)
    site = site._replace(path=path)
    pieces = list(interception.pieces(site, leaves, projections))
    links = [(piece, link) for piece in pieces for link in piece.links()]
    if keyed and any(link.is_random for _, link in links):
      continue
    plans = [
      choose(
        rows,
        link.low_rank(link.own(piece.leaves), piece.site),
        plan=interception.plan,
        forwards=interception.forwards,
        view=view,
        path=path,
      )
      for piece, link in links
      if link.low_rank is not None
    ]
    if FACTORED not in plans:
      made, bias = interception.whole_weights(pieces)
      yield path, (made.astype(kernel.dtype), bias)


def _bias_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
  return {"bias": meta.unbox(leaves["bias"])} if "bias" in leaves else {}


def _check_keys(
  interception: Interception, layer: nn.RNN, cell: nn.Module
) -> None:
  """Raises where `nn.RNN` would keep random keys from its cell."""
  passed = any(in_filter(names, KEYS) for names in layer.split_rngs)
  paths = (
    (*cell.path, *below)
    for below, _ in _layers_of(cell.variables.get("params", {}))
  )
  drawn = any(
    interception.is_adapted(path) and link.is_random and is_on(link, path)
    for path in paths
    for link in interception.adapter.methods
  )
  if drawn and not passed:
    raise UserError(
      f"{interception.adapter.name} draws random numbers in training, which"
      f" nn.RNN keeps from its cell {'/'.join(cell.path)}: make it with"
      f" split_rngs={{'params': False, {KEYS!r}: True}}."
    )


def _layers_of(params: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
  """The layers in a tree with a kernel of two axes: places and parameters."""
  for name, below in params.items():
    if name == "kernel" and meta.unbox(below).ndim == 2:
      yield (), params
    elif isinstance(below, Mapping):
      for place, leaves in _layers_of(below):
        yield (name, *place), leaves


def _rows(args: Any, kwargs: Any) -> int:
  """The rows that a cell's kernels see in a call of it, or of `nn.RNN`: those
  of all time steps."""
  arrays = jax.tree.leaves((args, kwargs))
  return max(x.size // x.shape[-1] for x in arrays if jnp.ndim(x))


def _in_cell(site: Any) -> Any:
  """A site, or a traced call, whose kernel of two axes is in a cell: folded
  once for all time steps, or factored in each."""
  plans = tuple(x for x in site.view.plans if x in ("factored", "folded"))
  return site._replace(view=site.view._replace(plans=plans))


def _traced_inside(module: Any, args: Any, kwargs: Any) -> tuple[Path, Any]:
  """Where the cell's layers lie, and how their traced calls are seen."""
  cell = module.cell if isinstance(module, nn.RNN) else module
  rows = _rows(args, kwargs)

  def seen(call: Any) -> Any:
    if len(call.kernel) != 2:
      return call
    if call.view.axes:  # a delta is made before any call shows this
      return (
        "it lies in a recurrent cell, and by its equation the kernel's"
        " outputs come before its inputs"
      )
    return _in_cell(call)._replace(tokens=max(rows, call.tokens))

  return cell.path, seen


KINDS[DenseParams] = Kind(_see_gates, _call_gates)
SPECIAL.append(
  Special((nn.RNN, nn.RNNCellBase), "__call__", _call_cell, _traced_inside)
)
