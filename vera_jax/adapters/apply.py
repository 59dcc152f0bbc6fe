"""Put an adapter on any linen model, from outside.

`adapt(model, adapter, targets=...)` is a linen module with the model's own
parameter tree, plus the adapter's leaves beside each adapted kernel and the
`projections` collection. The model's code is left alone: its Dense and
DenseGeneral calls are intercepted by path.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from vera_jax.adapters.interface import Adapter, Path, Target
from vera_jax.errors import UserError

LAYERS = (nn.Dense, nn.DenseGeneral)


def _matches(pattern: str, path: Path) -> bool:
  """Whether the regular expression matches the path's last names in full."""
  return bool(re.search(f"(?:^|/)(?:{pattern})$", "/".join(path)))


def _axes(layer: nn.Module, x: Array) -> tuple[int, ...]:
  """The axes of x that the layer contracts, in the order of its kernel's."""
  axis = layer.axis if isinstance(layer, nn.DenseGeneral) else -1
  axes = axis if isinstance(axis, Sequence) else (axis,)
  return tuple(sorted(a % x.ndim for a in axes))


def _features(layer: Any) -> tuple[int, ...]:
  features = layer.features
  return tuple(features) if isinstance(features, Sequence) else (features,)


def _is_layer(context: nn.module.InterceptorContext) -> bool:
  """Whether it is a call of a dense layer with one kernel for all rows."""
  layer = context.module
  return (
    isinstance(layer, LAYERS)
    and context.method_name == "__call__"
    and not getattr(layer, "batch_dims", ())
  )


class _Call(NamedTuple):
  """A dense layer's call: rows and widths of the product, kernel's rank."""

  tokens: int
  inputs: int
  outputs: int
  rank: int


def _record(found, next_fun, args, kwargs, context):
  """Interceptor: note each dense layer's call by the layer's path."""
  layer = context.module
  if _is_layer(context):
    x = kwargs.get("inputs", *args)
    axes, features = _axes(layer, x), _features(layer)
    inputs = math.prod(x.shape[a] for a in axes)
    found[layer.path] = _Call(
      tokens=x.size // inputs,
      inputs=inputs,
      outputs=math.prod(features),
      rank=len(axes) + len(features),
    )
  return next_fun(*args, **kwargs)


def _init_shapes(model: nn.Module, args: Any, kwargs: Any) -> Any:
  """The shapes of the model's variables; what is no array stays static."""
  inputs, tree = jax.tree.flatten((args, kwargs))
  arrays = {i: x for i, x in enumerate(inputs) if hasattr(x, "shape")}

  def init(key, arrays):
    leaves = [arrays.get(i, x) for i, x in enumerate(inputs)]
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return model.init(key, *args, **kwargs)

  return jax.eval_shape(init, jax.random.key(0), arrays)


def _calls(
  model: nn.Module, patterns: Sequence[str], args: Any, kwargs: Any
) -> tuple[dict[Path, _Call], dict[Path, Any]]:
  """The matched layers' calls, and the shapes of the model's parameters."""
  found: dict[Path, _Call] = {}
  with nn.intercept_methods(partial(_record, found)):
    params = flatten_dict(_init_shapes(model, args, kwargs)["params"])
  for pattern in patterns:
    if not any(_matches(pattern, path) for path in found):
      there = "\n  ".join("/".join(path) for path in found)
      raise UserError(
        f"No layer's path ends in the target pattern {pattern!r}. The layers"
        f" that can be adapted are:\n  {there}"
      )
  matched = {
    path: call
    for path, call in found.items()
    if any(_matches(pattern, path) for pattern in patterns)
  }
  return matched, params


def find_targets(
  model: nn.Module, patterns: Sequence[str], *args: Any, **kwargs: Any
) -> dict[Path, Target]:
  """The dense layers whose path ends in one of the patterns.

  Args:
    model: any linen module, unbound.
    patterns: regular expressions over "/"-joined paths; "query" matches every
      path that ends in the name `query`.
    *args: example inputs (arrays or `jax.ShapeDtypeStruct`); nothing is
      computed on them.
    **kwargs: keyword arguments of the model's call.

  Raises:
    UserError: a pattern matches no layer; the message lists those there are.
  """
  calls, params = _calls(model, patterns, args, kwargs)
  return {
    path: Target(
      call.inputs,
      call.outputs,
      tuple(params[(*path, "kernel")].shape[: -call.rank]),
    )
    for path, call in calls.items()
  }


def _is_plain(layer: Any) -> bool:
  """Whether the layer multiplies as `x @ kernel` does."""
  own = layer.precision, layer.dot_general, layer.dot_general_cls
  return own == (None, None, None)


def _kernel_and_bias(layer: Any, x: Array, outputs: int) -> Any:
  """x, the flat kernel and bias, of one type as the layer itself takes them."""
  own = layer.variables["params"]
  kernel = own["kernel"].reshape(-1, outputs)
  bias = own["bias"].reshape(-1) if layer.use_bias else None
  return layer.promote_dtype(x, kernel, bias, dtype=layer.dtype)


def _adapted(adapter, targets, projections, next_fun, args, kwargs, context):
  """Interceptor: the layer's output with an adapted kernel."""
  layer = context.module
  if not _is_layer(context) or not any(
    _matches(pattern, layer.path) for pattern in targets
  ):
    return next_fun(*args, **kwargs)
  plain = _is_plain(layer)
  first = not layer.has_variable("params", "kernel")  # init: the call makes it
  if first or not plain:
    y = next_fun(*args, **kwargs)
  x = kwargs.get("inputs", *args)
  axes, features = _axes(layer, x), _features(layer)
  x = jnp.moveaxis(x, axes, range(-len(axes), 0))
  x = x.reshape(*x.shape[: -len(axes)], -1)
  outputs = math.prod(features)
  inits = adapter.init(x.shape[-1], outputs)
  leaves = {name: layer.scope.param(name, f) for name, f in inits.items()}
  matrices = {**projections, **layer.variables.get("projections", {})}
  forward = partial(adapter.forward, leaves, matrices, outputs=outputs)
  if not plain:
    return y + forward(x.astype(y.dtype)).reshape(y.shape)
  x, kernel, bias = _kernel_and_bias(layer, x, outputs)
  y = forward(x, kernel)
  if bias is not None:
    y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
  return y.reshape(*y.shape[:-1], *features)


class Adapted(nn.Module):
  """A model and the adapter on it; made by `adapt`."""

  model: nn.Module
  adapter: Adapter
  targets: tuple[str, ...]

  def setup(self) -> None:
    nn.share_scope(self, self.model)  # the base keeps its parameters' names

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    projections = self.variables.get("projections", {})
    adapted = partial(_adapted, self.adapter, self.targets, projections)
    with nn.intercept_methods(adapted):
      return self.model(*args, **kwargs)

  @nn.nowrap
  def find_targets(self, *args: Any, **kwargs: Any) -> dict[Path, Target]:
    """The layers that the adapter is on, by path."""
    return find_targets(self.model, self.targets, *args, **kwargs)

  @nn.nowrap
  def plans(self, *args: Any, **kwargs: Any) -> dict[Path, str]:
    """How each adapted layer multiplies for inputs of these shapes."""
    calls, _ = _calls(self.model, self.targets, args, kwargs)
    plan = self.adapter.plan
    return {path: plan(*call[:3]) for path, call in calls.items()}

  @nn.nowrap
  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module.init`, with the collections `params` and `projections`."""
    projections = self.adapter.projections(self.find_targets(*args, **kwargs))
    base = {"projections": projections} if projections else {}
    _, new = self.apply(
      base, *args, rngs=rngs, mutable=nn.DenyList("projections"), **kwargs
    )
    return {**new, **base}


def adapt(
  model: nn.Module, adapter: Adapter, *, targets: Sequence[str]
) -> Adapted:
  """Wrap a linen model, unchanged, with an adapter at the matching layers.

  The result is used as the model is; its `init` adds the adapter's leaves and
  the `projections` collection, its output equals the model's until the adapter
  is trained. See `find_targets` for the patterns.
  """
  if isinstance(targets, str):
    raise UserError(f"targets is {targets!r}; give a list of patterns.")
  return Adapted(model, adapter, tuple(targets))


def adapter_size(adapter: Adapter, targets: Mapping[Path, Target]) -> int:
  """Trained numbers of an adapter on these layers, counted from shapes."""
  key = jax.random.key(0)
  return sum(
    target.layers * math.prod(jax.eval_shape(init, key).shape)
    for target in targets.values()
    for init in adapter.init(target.inputs, target.outputs).values()
  )
