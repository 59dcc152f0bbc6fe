"""`nn.Conv`: a window's taps times its channels are the inputs.

A layer that sees its inputs in groups, or masks its kernel, is only folded.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from vera_jax.adapters.interface import Matrix, View
from vera_jax.adapters.layer_calls import LayerCall, Params, own_call
from vera_jax.adapters.layers import KINDS, Kind, promoted, site_of
from vera_jax.adapters.structured import as_array


def _see(
  layer: Any, params: Params, *args: Any, **kwargs: Any
) -> tuple[View, int]:
  *window, _, outputs = params["kernel"].shape
  groups = layer.feature_group_count
  view = View(
    type(layer).__name__, taps=math.prod(window), groups=groups, forms=True
  )
  folded_only = groups > 1 or layer.mask is not None
  return view._replace(plans=("folded",)) if folded_only else view, outputs


def _call(layer: Any, params: Params, inputs: Array) -> LayerCall:
  view, outputs = _see(layer, params)
  *window, channels, _ = params["kernel"].shape
  x, bias = promoted(layer, inputs, params, "kernel")
  bare = layer.clone(parent=None, name=None, use_bias=False)

  def project(x: Array, matrix: Matrix) -> Array:
    """The convolution with a matrix of any number of outputs."""
    wide = bare.clone(features=matrix.shape[-1])
    matrix = as_array(matrix, x.dtype)
    kernel = matrix.reshape(*window, channels, -1)
    return own_call(wide, {"kernel": kernel}, x)

  shape = math.prod(window) * channels, outputs
  y = jax.eval_shape(project, x, jax.ShapeDtypeStruct(shape, x.dtype))
  site = site_of(
    params,
    view,
    outputs,
    dtype=x.dtype,
    bias=bias,
    rows=math.prod(y.shape[:-1]),
    multiply=project,
    project=project,
  )
  return LayerCall(site, x)


KINDS[nn.Conv] = Kind(_see, _call)
