"""The sites of a model, found by tracing it.

The model's own code is left alone. Its layers' calls are noted by path while
its shapes are traced; nothing is computed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import DenyList, apply, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.intercept import special_call
from vera_jax.adapters.interface import EMPTY, MATRIX, Path, Target, View
from vera_jax.adapters.layer_calls import (
  IN_MODEL,
  LayerCall,
  is_apart,
  is_own_call,
)
from vera_jax.adapters.layers import place_of, see_call
from vera_jax.adapters.programs import changed, mark, reads, remembered
from vera_jax.adapters.sites import (
  EVERY,
  Fused,
  arrays_at,
  layer_path,
  matches,
  parts_of,
)
from vera_jax.errors import UserError

SHOWN = 20  # layers that can't be adapted, in a message


class Call(NamedTuple):
  """A layer's call while it was traced: rows of x, widths, its own kernel.

  The rows of a recurrent cell's kernel are those of all time steps.
  """

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
        layer.put_variable("params", view.kernel, _Noted(kernel))
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
  places = {path: _kernel_path(path, call.view) for path, call in calls.items()}
  biases = [(*kernel[:-1], "bias") for kernel in places.values()]
  weights = {
    place: meta.unbox(boxed[place])
    for place in (*places.values(), *biases)
    if place in boxed
  }

  def cut(next_fun, args, kwargs, context):
    """Zeros for what a layer that can be adapted returns, so that the model's
    output depends on its kernel only where that is read by other ways. What the
    layer has for its parameters is marked, to be compared with the model's."""
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
      mark(params[name], "/".join((*places[path][:-1], name)))
    return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), result)

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

  with nn.intercept_methods(cut):
    program = jax.make_jaxpr(outputs)(
      weights, unboxed, jax.random.key(0), arrays
    )
  read = reads(program, weights)
  remade = changed(program, ["/".join(place) for place in sorted(weights)])
  for path in places.keys() & applied:
    kernel, bias = places[path], (*places[path][:-1], "bias")
    changes = [x[-1] for x in (kernel, bias) if "/".join(x) in remade]
    if read[kernel]:
      refused[path] = (
        f"its {kernel[-1]} is also read without a call of it, by the module"
        " that holds it or by another one, which an adapter would pass by"
      )
    elif changes and not any(getattr(boxed[kernel], "axes", ())):
      refused[path] = (
        f"its {changes[0]} is changed on the way to it, as by nn.WeightNorm,"
        " nn.SpectralNorm or nn.map_variables: what it multiplies with is not"
        " what the parameters hold and merging would write"
      )
    if path in refused:
      del calls[path]
  return Traced(calls, refused, first.variables, frozenset(applied))


def _kernel_path(path: Path, view: View) -> Path:
  return (*(path[:-1] if view.in_scope else path), view.kernel)


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
    place = _kernel_path(path, call.view)
    noted = shapes[place]
    if not isinstance(noted, _Noted):
      more = len(noted.shape) - len(call.kernel)
      noted = _Noted(noted, (0,) * more)
    stack = noted.value.shape[: len(noted.axes)]
    if any(noted.axes) or noted.value.shape != (*stack, *call.kernel):
      astray[place] = noted.axes
    found[path] = Target(call.inputs, call.outputs, stack, None, call.view)
    layers[path] = call
    for name, (first, last) in parts_of(path, fused).items():
      found[*path, name] = Target(
        call.inputs, last - first, stack, (first, last), call.view
      )
      layers[*path, name] = call
  held, other = _uncalled(traced)
  unfit = held | other
  _check_parts(fused, calls, unfit)
  for pattern in patterns:
    named = any(matches(pattern, path) for path in found)
    wrong = {} if pattern == EVERY else held if named else held | other
    wrong = {p: why for p, why in wrong.items() if matches(pattern, p)}
    if wrong:
      listed = "\n  ".join(f"{'/'.join(p)}: {why}" for p, why in wrong.items())
      raise UserError(
        f"The target pattern {pattern!r} matches what no adapter would run"
        f" on:\n  {listed}\n{_there(found, {} if found else unfit)}"
      )
    if not named:
      raise UserError(
        f"No layer's path ends in the target pattern {pattern!r}."
        f" {_there(found, unfit)}"
      )
  chosen = []
  for path in found:
    by = [pattern for pattern in patterns if matches(pattern, path)]
    layer, view = layer_path(path, found[path]), found[path].view
    place = *layer, view.kernel
    whole = path[:-1] if found[path].columns else path
    if by == [EVERY] and (place in astray or whole in held):
      continue  # it names none in particular
    if by and place in astray:
      raise UserError(
        f"The kernels of {'/'.join(layer)} are stacked on axes {astray[place]},"
        " or changed by a transformation. An adapter needs a stack's axis in"
        " front: nn.scan(..., variable_axes={'params': 0, 'projections': 0})."
      )
    chosen += [path] if by else []
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


def _check_parts(
  fused: Fused, calls: Mapping[Path, Call], unfit: Mapping[Path, str]
) -> None:
  """Raises a UserError for parts of layers that there are not, or of columns
  that their kernels have not, or that two of them share."""
  for pattern in fused:
    if not any(matches(pattern, path) for path in (*calls, *unfit)):
      raise UserError(
        f"No layer's path ends in the pattern {pattern!r} of `fused`."
        f" {_there(calls, unfit)}"
      )
  for path, call in calls.items():
    done = 0
    parts = parts_of(path, fused)
    for name, (first, last) in sorted(parts.items(), key=lambda x: x[1]):
      if not done <= first < last <= call.outputs:
        raise UserError(
          f"The part {name!r} of {'/'.join(path)} has the columns {first} to"
          f" {last}; parts must not overlap, and the kernel has {call.outputs}"
          " columns."
        )
      done = last


def _there(found: Collection[Path], unfit: Mapping[Path, str]) -> str:
  """The layers that can be adapted, or without one why those there can't."""
  if found:
    there = "\n  ".join("/".join(path) for path in found)
    return f"The layers that can be adapted are:\n  {there}"
  if not unfit:
    return "The model has no layer with a matrix."
  lines = [f"{'/'.join(path)}: {why}" for path, why in unfit.items()]
  more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
  there = "\n  ".join((*lines[:SHOWN], *more))
  return f"No layer of this model can be adapted:\n  {there}"


def _uncalled(
  traced: Traced,
) -> tuple[dict[Path, str], dict[Path, str]]:
  """What holds a matrix but can't be adapted, by path, and why.

  Returns:
    Layers that hold a kernel; and all other parameters of several axes, by
    their modules' paths and by their own.
  """
  held, other = dict(traced.refused), dict[Path, str]()
  called = {_kernel_path(p, call.view) for p, call in traced.calls.items()}
  shapes = flatten_dict(meta.unbox(traced.variables["params"]))
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
      other[path] = why
      other.setdefault(path[:-1], why)  # its first parameter's
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
