"""The sites of a model that patterns name, and why others can't be adapted."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict

from vera_jax.adapters.interface import EMPTY, Path, Target
from vera_jax.adapters.sites import (
  EVERY,
  Fused,
  layer_path,
  matches,
  parts_of,
)
from vera_jax.adapters.tracing import Call, Noted, Traced, kernel_path, trace
from vera_jax.errors import UserError

SHOWN = 20  # layers that can't be adapted, in a message
Reasons = dict[Path, str]


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
  traced = trace(model, *args, **kwargs)
  sites, calls, astray = _all_sites(traced, fused)
  layers, others = _unfit(traced)
  check_parts(fused, traced.calls, layers | others)
  chosen = choose(patterns, sites, layers, others, astray)
  return (
    chosen,
    {path: calls[_layer_of(path, site)] for path, site in chosen.items()},
    meta.unbox(traced.variables),
  )


def choose(
  patterns: Sequence[str],
  sites: Mapping[Path, Target],
  layers: Reasons,
  others: Reasons,
  astray: Mapping[Path, tuple[int, ...]],
) -> dict[Path, Target]:
  """The sites that the patterns match, in their order.

  Args:
    patterns: of targets.
    sites: every layer that can be adapted, and every part of one.
    layers, others: why other layers, and other parameters, can't be.
    astray: by a kernel's path the axes of a stack that don't lie in front.

  Raises:
    UserError: as for `trace_sites`.
  """
  for pattern in patterns:
    _check_pattern(pattern, sites, layers, others)
  chosen: dict[Path, Target] = {}
  for path, site in sites.items():
    by = [pattern for pattern in patterns if matches(pattern, path)]
    layer = layer_path(path, site)
    stacked_on = astray.get((*layer, site.view.kernel))
    unfit = stacked_on is not None or _layer_of(path, site) in layers
    if not by or (by == [EVERY] and unfit):  # which names none in particular
      continue
    if stacked_on is not None:
      raise UserError(
        f"The kernels of {'/'.join(layer)} are stacked on axes {stacked_on},"
        " or changed by a transformation. An adapter needs a stack's axis in"
        " front: nn.scan(..., variable_axes={'params': 0, 'projections': 0})."
      )
    chosen[path] = site
  for path in chosen:
    if chosen[path].columns and path[:-1] in chosen:
      raise UserError(
        f"The targets name both {'/'.join(path[:-1])} and its part"
        f" {path[-1]!r}; name one of them."
      )
  return chosen


def with_parts(
  layers: Mapping[Path, Target], fused: Fused
) -> dict[Path, Target]:
  """The layers, each with the parts of its kernel behind it."""
  sites: dict[Path, Target] = {}
  for path, site in layers.items():
    sites[path] = site
    for name, (first, last) in parts_of(path, fused).items():
      sites[*path, name] = site._replace(
        outputs=last - first, columns=(first, last)
      )
  return sites


def _layer_of(path: Path, site: Target) -> Path:
  """The path of the layer that a site is, or is a part of."""
  return path[:-1] if site.columns else path


def _all_sites(
  traced: Traced, fused: Fused
) -> tuple[dict[Path, Target], dict[Path, Call], dict[Path, tuple[int, ...]]]:
  """Every layer that can be adapted and every part of one, by path; the calls
  of the layers; and, by the kernel's path, the axes of stacks that don't lie in
  front."""
  shapes = flatten_dict(traced.variables["params"])
  layers: dict[Path, Target] = {}
  astray: dict[Path, tuple[int, ...]] = {}
  for path, call in traced.calls.items():
    kernel = kernel_path(path, call.view)
    noted = shapes[kernel]
    if not isinstance(noted, Noted):
      more = len(noted.shape) - len(call.kernel)
      noted = Noted(noted, (0,) * more)
    stack = noted.value.shape[: len(noted.axes)]
    if any(noted.axes) or noted.value.shape != (*stack, *call.kernel):
      astray[kernel] = noted.axes
    layers[path] = Target(call.inputs, call.outputs, stack, None, call.view)
  return with_parts(layers, fused), traced.calls, astray


def _unfit(traced: Traced) -> tuple[Reasons, Reasons]:
  """What holds a matrix but can't be adapted, by path, and why.

  Returns:
    Layers that hold a kernel; and all other parameters of several axes, by
    their modules' paths and by their own.
  """
  layers, others = dict(traced.refused), Reasons()
  called = {kernel_path(p, call.view) for p, call in traced.calls.items()}
  shapes = flatten_dict(meta.unbox(traced.variables["params"]))
  for path, leaf in shapes.items():
    if path in called or len(leaf.shape) < 2 or path[:-1] in layers:
      continue
    why = (
      f"its {path[-1]} is read without a call of a known layer, by the module"
      " itself or by another one"
    )
    if path[-1] == "kernel":
      layers[path[:-1]] = why
    else:
      others[path] = why
      others.setdefault(path[:-1], why)  # its first parameter's
  if traced.applied is not None:
    for path in traced.calls.keys() - traced.applied:
      layers[path] = (
        "it is called only while the model is initialised; later its kernel is"
        " read by another module, which passes by the call"
      )
  return layers, others


def _check_pattern(
  pattern: str, sites: Collection[Path], layers: Reasons, others: Reasons
) -> None:
  """Raises a UserError for a pattern that matches no site, or beside some what
  no adapter would run on."""
  unfit = layers | others
  named = any(matches(pattern, path) for path in sites)
  suspects = {} if pattern == EVERY else layers if named else unfit
  wrong = {p: why for p, why in suspects.items() if matches(pattern, p)}
  if wrong:
    listed = "\n  ".join(f"{'/'.join(p)}: {why}" for p, why in wrong.items())
    raise UserError(
      f"The target pattern {pattern!r} matches what no adapter would run on:\n"
      f"  {listed}\n{_there(sites, {} if sites else unfit)}"
    )
  if not named:
    raise UserError(
      f"No layer's path ends in the target pattern {pattern!r}."
      f" {_there(sites, unfit)}"
    )


def check_parts(
  fused: Fused, layers: Mapping[Path, Call | Target], unfit: Reasons
) -> None:
  """Raises a UserError for parts of layers that there are not, or of columns
  that their kernels have not, or that two of them share."""
  for pattern in fused:
    if not any(matches(pattern, path) for path in (*layers, *unfit)):
      raise UserError(
        f"No layer's path ends in the pattern {pattern!r} of `fused`."
        f" {_there(layers, unfit)}"
      )
  for path, layer in layers.items():
    done = 0
    parts = parts_of(path, fused)
    for name, (first, last) in sorted(parts.items(), key=lambda x: x[1]):
      if not done <= first < last <= layer.outputs:
        raise UserError(
          f"The part {name!r} of {'/'.join(path)} has the columns {first} to"
          f" {last}; parts must not overlap, and the kernel has {layer.outputs}"
          " columns."
        )
      done = last


def _there(sites: Collection[Path], unfit: Reasons) -> str:
  """The layers that can be adapted, or without one why those there can't."""
  if sites:
    listed = "\n  ".join("/".join(path) for path in sites)
    return f"The layers that can be adapted are:\n  {listed}"
  if not unfit:
    return "The model has no layer with a matrix."
  lines = [f"{'/'.join(path)}: {why}" for path, why in unfit.items()]
  more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
  listed = "\n  ".join((*lines[:SHOWN], *more))
  return f"No layer of this model can be adapted:\n  {listed}"
