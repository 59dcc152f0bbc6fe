"""Layers that are one of flax's by their class and compute something else.

Which product such a layer makes is unknown; which kernel it has is not. So its
own code runs, on the adapted kernel.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from vera_jax.adapters.interface import View
from vera_jax.adapters.layer_calls import LayerCall, Params, bound_call
from vera_jax.adapters.layers import OWN_CODE, flat_bias, own_kernel, site_of


def by_own_code(
  layer: nn.Module,
  params: Params,
  view: View,
  outputs: int,
  args: Any,
  kwargs: Any,
) -> LayerCall | str:
  """The layer's call, made by its own code with another kernel and bias."""
  name = view.kernel
  if name not in params:
    return f"its class has a call of its own, and no parameter {name!r}"
  inputs = jax.tree.leaves([*args, *kwargs.values()])
  arrays = [x for x in inputs if hasattr(x, "ndim") and x.ndim]
  if not arrays:
    return "its class has a call of its own, which was given no array"

  return folded_call(
    params,
    view,
    outputs,
    arrays[0],
    lambda changed: bound_call(
      layer, changed, lambda layer: layer(*args, **kwargs)
    ),
  )


def folded_call(
  params: Params,
  view: View,
  outputs: int,
  x: Array,
  run: Callable[[Params], Any],
) -> LayerCall:
  """A call of which only the kernel is known: adapted by folding.

  Args:
    params, view, outputs: of the layer.
    x: what it is called with.
    run: the layer's own code, with other values of some parameters.
  """
  name = view.kernel

  def own_code(kernel: Array, bias: Array | None) -> Any:
    changed = {name: own_kernel(kernel, params[name].shape, (), view)}
    if bias is not None:
      changed["bias"] = bias.reshape(params["bias"].shape)
    return run(changed)

  site = site_of(
    params,
    view._replace(plans=("folded",)),
    outputs,
    dtype=params[name].dtype,
    bias=flat_bias(params, ()),
    rows=x.size // x.shape[-1],
  )
  return LayerCall(site, x, own_code=own_code)


OWN_CODE.append(by_own_code)
