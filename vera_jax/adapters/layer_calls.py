"""A layer's call: seen as one product, and its own code on other weights."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
from jax import Array

from vera_jax.adapters.interface import EMPTY, Path, Site

Params = Mapping[str, Any]  # a layer's own parameters
# A flag of the model's own scope, which all scopes below it have as well, those
# of `nn.scan` and other transformations among them.
IN_MODEL = "vera_jax"


def _as_it_is(y: Array) -> Array:
  return y


class LayerCall(NamedTuple):
  """A layer's call, seen as one product.

  Attributes:
    site: the product: widths, kernel and bias of the type that the layer
      computes in, and how it multiplies. Its path is set by who asks.
    x: (*t, i), or what else the site's `multiply` takes: of a convolution its
      images, of an embedding the numbers of rows.
    finish: (*t, o) -> the layer's output.
    plain: whether it multiplies by `x @ kernel`.
    own_code: (kernel (i, o), bias (o,) or None) -> the layer's output, by code
      that may do anything with them. Where it is there, only folding is right,
      and the site's `multiply`, `project` and `finish` are not used.
  """

  site: Site
  x: Array
  finish: Callable[[Array], Any] = _as_it_is
  plain: bool = False
  own_code: Callable[[Array, Array | None], Any] | None = None


_OWN = ContextVar("own", default=False)
_BOUND = ContextVar[tuple[Path, ...]]("bound", default=())


def own_call(
  layer: nn.Module,
  params: Params,
  *args: Any,
  others: Mapping[str, Any] = EMPTY,
  **kwargs: Any,
) -> Any:
  """An unbound layer's own code on these parameters, adapted no more.

  Args:
    layer: unbound.
    params: its parameters.
    others: its other collections.
    args, kwargs: of `apply`.
  """
  token = _OWN.set(True)
  try:
    return layer.apply({**others, "params": params}, *args, **kwargs)
  finally:
    _OWN.reset(token)


def bound_call(
  layer: nn.Module, changed: Params, call: Callable[[Any], Any]
) -> Any:
  """call(layer), the layer's own code with some of its parameters replaced,
  adapted no more. The layers in it are, and it has its random keys and all of
  its variables, which it may change."""

  def run(layer: nn.Module) -> Any:
    token = _BOUND.set((*_BOUND.get(), layer.path))
    try:
      return call(layer)
    finally:
      _BOUND.reset(token)

  def replaced(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": {**variables["params"], **changed}}

  return nn.map_variables(run, "params", trans_in_fn=replaced)(layer)


def is_own_call(layer: nn.Module) -> bool:
  """Whether an intercepted call is inside `own_call`, or what `bound_call`
  runs."""
  return _OWN.get() or layer.path in _BOUND.get()


def is_apart(layer: nn.Module) -> bool:
  """Whether a bound layer is none of the model's, which has applied it unbound,
  to values of its own choice. By its path it may be one."""
  return layer.scope is None or not layer.scope.get_flag(IN_MODEL, False)
