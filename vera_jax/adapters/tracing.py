"""What a trace of a model shows of its layers' calls.

The model's own code is left alone. Its layers' calls are noted by path while
its shapes are traced; nothing is computed. `targets.py` finds sites in that.
"""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import DenyList, apply, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.intercept import special_call
from vera_jax.adapters.interface import MATRIX, Path, View
from vera_jax.adapters.layer_calls import (
  IN_MODEL,
  LayerCall,
  is_apart,
  is_own_call,
)
from vera_jax.adapters.layers import place_of, see_call
from vera_jax.adapters.programs import changed, mark, reads, remembered
from vera_jax.adapters.sites import (
  arrays_at,
)

# The kinds of layers beside flax's dense ones, which register themselves.
import_module("vera_jax.adapters.kinds")


class Call(NamedTuple):
  """A layer's call while it was traced: rows of x, widths, its own kernel.

  The rows of a recurrent cell's kernel are those of all time steps.
  """

  tokens: int
  inputs: int
  outputs: int
  kernel: tuple[int, ...]
  view: View = MATRIX


class Noted(struct.PyTreeNode, meta.AxisMetadata):
  """A kernel's shape that notes where `nn.scan` or `nn.vmap` stacks it."""

  value: Any
  axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, value: Any) -> "Noted":
    return self.replace(value=value)

  def add_axis(self, index: int, params: Any) -> "Noted":
    return self.replace(axes=(index, *self.axes))

  def remove_axis(self, index: int, params: Any) -> "Noted":
    return self.replace(axes=self.axes[1:])


class Traced(NamedTuple):
  """What one trace of a model shows.

  Attributes:
    calls: of layers that can be adapted, by path.
    refused: why others can't be, by path.
    variables: the shapes of the model's, kernels boxed in `Noted` unless the
      model itself reads one.
    applied: paths of the layers that are called once the model is initialised;
      None where it can't be applied to the inputs that initialise it.
  """

  calls: dict[Path, Call]
  refused: dict[Path, str]
  variables: Any
  applied: frozenset[Path] | None


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Traced:
  """Traces the model, or remembers how it was traced on such inputs."""
  x64 = jnp.zeros(()).dtype == jnp.float64
  return remembered(_trace_once, (args, kwargs), model, x64)


@lru_cache(maxsize=64)
def _trace_once(
  structure: Any, inputs: tuple[Any, ...], model: nn.Module, x64: bool
) -> Traced:
  args, kwargs = jax.tree.unflatten(structure, inputs)
  traced = None
  # A box is what a module finds that reads another's kernel, or its name among
  # those of the parameters; so the model is traced without boxes where it can't
  # be with them. One that changes other variables may only run without that.
  for boxed in (True, False):
    try:
      first = _initialised(model, args, kwargs, boxed=boxed)
    except Exception:
      if not boxed:
        raise
      continue
    traced = traced or first
    # A cache may take one token at a time; without it, it is made once more.
    for kept, mutable in (
      (True, DenyList("params")),
      (True, False),
      (False, DenyList("params")),
    ):
      try:
        return _applied(first, model, args, kwargs, mutable=mutable, kept=kept)
      except Exception:
        continue
  assert traced is not None
  return traced


def _initialised(
  model: nn.Module, args: Any, kwargs: Any, *, boxed: bool
) -> Traced:
  """What the calls of layers show while the model is initialised."""
  calls: dict[Path, Call] = {}
  refused: dict[Path, str] = {}
  insides: list[tuple[Path, Any]] = []  # of modules that say more of layers

  def note(next_fun, args, kwargs, context):
    layer, result = context.module, next_fun(*args, **kwargs)
    if context.method_name != "__call__" or is_own_call(layer):
      return result
    if not layer.is_initializing():  # applied unbound, on values of its own
      return result
    special = special_call(layer, "__call__")
    if special is not None and special.inside is not None:
      insides.append(special.inside(layer, args, kwargs))
    params = arrays_at(layer.variables.get("params", {}))
    intercepted = next_fun is not context.orig_method
    seen = see_call(layer, params, args, kwargs, intercepted=intercepted)
    path = (*layer.path, *place_of(layer))
    if isinstance(seen, str):
      refused[path] = seen
    elif isinstance(seen, LayerCall):
      site = seen.site
      view = site.view._replace(in_scope=path != layer.path)
      kernel = meta.unbox(layer.get_variable("params", view.kernel))
      if boxed:
        layer.put_variable("params", view.kernel, Noted(kernel))
      assert site.rows is not None
      call = Call(site.rows, site.inputs, site.outputs, kernel.shape, view)
      known = calls.setdefault(path, call)
      if known._replace(tokens=call.tokens) != call:
        refused[path] = "its calls see its kernel in different ways"
    return result

  with nn.intercept_methods(note):
    variables = init_shapes(model, *args, **kwargs)
  for outer, seen_inside in insides:
    for path, call in calls.items():
      if path[: len(outer)] == outer and path not in refused:
        seen = seen_inside(call)
        if isinstance(seen, str):
          refused[path] = seen
        else:
          calls[path] = seen
  for path in refused:
    calls.pop(path, None)
  return Traced(calls, refused, variables, None)


def _applied(
  first: Traced,
  model: nn.Module,
  args: Any,
  kwargs: Any,
  *,
  mutable: Any,
  kept: bool,
) -> Traced:
  """The same without the layers that an application of the model shows not to
  be what their calls say: its program tells how it uses each kernel.

  Args:
    first: what its initialisation shows.
    model, args, kwargs: and the inputs that initialise it.
    mutable: collections that may change.
    kept: whether it has its other collections than the parameters.
  """
  calls, refused, applied = dict(first.calls), dict(first.refused), set[Path]()
  arrays, build = _arrays_of((args, kwargs))
  boxed = flatten_dict(first.variables["params"])
  unboxed = meta.unbox(first.variables)
  if not kept:
    unboxed = {"params": unboxed["params"]}
  kernels = {path: kernel_path(path, call.view) for path, call in calls.items()}
  biases = [(*kernel[:-1], "bias") for kernel in kernels.values()]
  weights = {
    path: meta.unbox(boxed[path])
    for path in (*kernels.values(), *biases)
    if path in boxed
  }

  def call(scope, arrays):
    args, kwargs = build(arrays)
    return model.clone(parent=scope, _deep_clone=True)(*args, **kwargs)

  def outputs(weights, variables, key, arrays):
    params = unflatten_dict(flatten_dict(variables["params"]) | weights)
    variables = {**variables, "params": params}
    run = apply(call, mutable, flags={IN_MODEL: True})
    # the key is that of all other streams, too
    made = run(variables, arrays, rngs={"params": key})
    return made[0] if mutable else made

  with nn.intercept_methods(_marker(calls, kernels, applied)):
    program = jax.make_jaxpr(outputs)(
      weights, unboxed, jax.random.key(0), arrays
    )
  read = reads(program, weights)
  remade = changed(program, ["/".join(path) for path in sorted(weights)])
  for path in kernels.keys() & applied:
    kernel = kernels[path]
    # a stack in another place than in front is refused later, and it is moved
    stacked = any(getattr(boxed[kernel], "axes", ()))
    if why := _misuse(kernel, read, set() if stacked else remade):
      refused[path] = why
      del calls[path]
  return Traced(calls, refused, first.variables, frozenset(applied))


def _marker(
  calls: Mapping[Path, Call], kernels: Mapping[Path, Path], applied: set[Path]
) -> Callable[..., Any]:
  """An interceptor that notes which layers are called and marks their weights.

  What a layer that can be adapted has for its parameters is marked, to be
  compared with the model's. It returns zeros, so that the model's output
  depends on its kernel only where that is read by other ways.

  Args:
    calls: of layers that can be adapted.
    kernels: where their kernels lie.
    applied: the paths of all layers that are called are added to it.
  """

  def note(next_fun, args, kwargs, context):
    layer, result = context.module, next_fun(*args, **kwargs)
    path = (*layer.path, *place_of(layer))
    if is_own_call(layer) or is_apart(layer):
      return result
    called = context.method_name == "__call__"
    if called:
      applied.add(path)
    special = special_call(layer, context.method_name)
    if path not in calls or not (called or special):
      return result
    params = arrays_at(layer.variables["params"])
    for name in params.keys() & {calls[path].view.kernel, "bias"}:
      mark(params[name], "/".join((*kernels[path][:-1], name)))
    return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), result)

  return note


def _misuse(
  kernel: Path, read: Mapping[Path, bool], remade: Collection[str]
) -> str | None:
  """Why an adapter would not do what merging does at a layer, if so.

  Args:
    kernel: where it lies.
    read: whether the model's output depends on it by other ways than the layer.
    remade: what the layer has is another value than the model's parameter.
  """
  if read[kernel]:
    return (
      f"its {kernel[-1]} is also read without a call of it, by the module"
      " that holds it or by another one, which an adapter would pass by"
    )
  for path in (kernel, (*kernel[:-1], "bias")):
    if "/".join(path) in remade:
      return (
        f"its {path[-1]} is changed on the way to it, as by nn.WeightNorm,"
        " nn.SpectralNorm or nn.map_variables: what it multiplies with is not"
        " what the parameters hold and merging would write"
      )
  return None


def kernel_path(path: Path, view: View) -> Path:
  """Where the kernel of the layer at a path lies among the parameters."""
  return (*(path[:-1] if view.in_scope else path), view.kernel)


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
