"""LoRA (arXiv 2106.09685), the baseline: h = W0 x + (alpha / r) B A x.

Every layer has matrices A (r x in) and B (out x r) of its own, both trained; A
starts as torch's `kaiming_uniform_(a=sqrt(5))`, B at 0.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.adapters import products as contraction
from vera_jax.adapters.interface import Adapter, Leaves, Path, Target
from vera_jax.errors import UserError

A, B = "lora_A", "lora_B"


def lora(
  rank: int = 8,
  *,
  alpha: float = 8.0,
  plan: str = contraction.AUTO,
  forwards: int = 1,
) -> Adapter:
  """LoRA as an `Adapter`; the delta is scaled by alpha / rank.

  `plan` and `forwards` are as in `vera.vera`; mixed is no plan of LoRA's.
  """
  if rank < 1:
    raise UserError(f"LoRA's rank is {rank}; it must be at least 1.")
  contraction.check_plan(plan)
  if plan == "mixed":
    raise UserError("LoRA has no mixed plan; choose auto, factored or folded.")
  planned = partial(_plan, plan=plan, rank=rank, forwards=forwards)
  return Adapter(
    name="lora",
    projections=_no_projections,
    init=partial(_init, rank=rank),
    forward=partial(_forward, scale=alpha / rank, plan=planned),
    kernel=partial(_kernel, scale=alpha / rank),
    plan=planned,
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


def _plan(
  tokens: int, inputs: int, outputs: int, *, plan: str, rank: int, forwards: int
) -> str:
  """Both matrices are trained: each product comes back once more for them."""
  if plan != contraction.AUTO:
    return plan
  thin = tokens * rank * (inputs + outputs)
  build = rank * inputs * outputs
  folded = (forwards + 2) * build + tokens * inputs * outputs
  return "factored" if (forwards + 2) * thin <= folded else "folded"


def _forward(
  leaves: Leaves,
  projections: Leaves,
  x: Float[Array, "*t i"],
  kernel: Float[Array, "i o"] | None = None,
  *,
  outputs: int,
  scale: float,
  plan: Callable[[int, int, int], str],
) -> Float[Array, "*t o"]:
  del projections
  down, up = leaves[A].T.astype(x.dtype), leaves[B].T.astype(x.dtype)
  how = plan(math.prod(x.shape[:-1]), x.shape[-1], outputs)
  if kernel is not None and how != "factored":
    return contraction.FOLDING[how](x, kernel, down, scale * up)
  delta = scale * ((x @ down) @ up)
  return delta if kernel is None else x @ kernel + delta


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
