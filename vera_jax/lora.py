"""LoRA (arXiv 2106.09685), the baseline: h = W0 x + (alpha / r) B A x.

Every layer has matrices A (r x in) and B (out x r) of its own, both trained; A
starts as torch's `kaiming_uniform_(a=sqrt(5))`, B at 0.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.adapter import Adapter, Leaves, Path, Target
from vera_jax.errors import UserError

A, B = "lora_A", "lora_B"


def lora(rank: int = 8, *, alpha: float = 8.0) -> Adapter:
  """LoRA as an `Adapter`; the delta is scaled by alpha / rank."""
  if rank < 1:
    raise UserError(f"LoRA's rank is {rank}; it must be at least 1.")
  return Adapter(
    name="lora",
    projections=_no_projections,
    init=partial(_init, rank=rank),
    forward=partial(_forward, scale=alpha / rank),
    kernel=partial(_kernel, scale=alpha / rank),
  )


def _no_projections(targets: Mapping[Path, Target]) -> dict[str, Array]:
  del targets
  return {}


def _init(inputs: int, outputs: int, *, rank: int):
  bound = inputs**-0.5
  return {
    A: lambda key: jax.random.uniform(
      key, (rank, inputs), jnp.float32, minval=-bound, maxval=bound
    ),
    B: lambda key: jnp.zeros((outputs, rank), jnp.float32),
  }


def _forward(
  leaves: Leaves,
  projections: Leaves,
  x: Float[Array, "*t i"],
  *,
  outputs: int,
  scale: float,
) -> Float[Array, "*t o"]:
  del projections, outputs
  down, up = leaves[A].astype(x.dtype), leaves[B].astype(x.dtype)
  return scale * ((x @ down.T) @ up.T)


def _kernel(
  leaves: Leaves,
  projections: Leaves,
  *,
  inputs: int,
  outputs: int,
  scale: float,
) -> Float[Array, "i o"]:
  del projections, inputs, outputs
  return scale * jnp.einsum(
    "ri,or->io", leaves[A], leaves[B], precision="highest"
  )
