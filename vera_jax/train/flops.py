"""How much a program computes, and how much a chip could.

XLA's own count takes the body of a loop once, and so one of the stacked layers;
so products are counted before XLA, in the traced program.
"""

import math

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh

# Dense bfloat16 FLOP/s of one JAX device, as published by Google and NVIDIA. A
# TPU v2 or v3 chip is two devices.
PEAK = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_of(mesh: Mesh) -> float | None:
  """FLOP/s of a mesh's devices together; None where they are in no table."""
  peak = PEAK.get(mesh.devices.flat[0].device_kind)
  return None if peak is None else peak * mesh.size


def flops_of(program: Jaxpr) -> float:
  """FLOPs of a program's products and convolutions, on all devices together.

  Of a branch that which may be taken costs most is counted, and of a loop of
  unknown length one turn.
  """
  return sum(_of_equation(equation) for equation in program.eqns)


def _of_equation(equation: JaxprEqn) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape  # type: ignore[attr-defined]
    each = math.prod(shape[axis] for axis in contracted)
  elif name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape  # type: ignore[attr-defined]
    outputs, *_ = params["dimension_numbers"].rhs_spec
    each = math.prod(kernel) // kernel[outputs]
  else:
    inner = [flops_of(program) for program in jaxprs_in_params(params)]
    if name == "cond":
      return max(inner, default=0.0)
    times = params.get("length", 1)  # a scan has one
    if name == "shard_map":  # each device does its part
      times = params["mesh"].size
    return sum(inner) * times
  (output,) = equation.outvars
  return 2.0 * each * math.prod(output.aval.shape)  # type: ignore[attr-defined]
