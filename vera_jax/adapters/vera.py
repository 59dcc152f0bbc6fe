"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

  h = W0 x + b * (B (d * (A x)))                                  (equation 2)

A (r x in_max) and B (out_max x r) are one frozen random pair for the whole
network; a layer takes the leading columns of A and rows of B that it needs.
d (r) and b (out) are all that is trained. There is no alpha.

`contraction.py` has the orders in which this is multiplied out.

Einsum letters, here and in `lora.py`: r rank, i in, o out.
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import constant
from jaxtyping import Float

from vera_jax.adapters import products as contraction
from vera_jax.adapters.interface import Adapter, Leaves
from vera_jax.adapters.projections import make_projections
from vera_jax.errors import UserError

D, B_VECTOR = "vera_d", "vera_b"


def vera(
  rank: int = 256,
  *,
  d_init: float = 0.1,
  init: str = "kaiming_uniform",
  projection_seed: int = 0,
  train: str = "both",
  sharing: str = "shared",
  plan: str = contraction.AUTO,
  forwards: int = 1,
) -> Adapter:
  """VeRA as an `Adapter`.

  Args:
    rank: r; may exceed the layers' widths (section 3.1).
    d_init: the value that every entry of d starts from; b starts at 0.
    init: how A and B are drawn, a name in `projections.INITIALISERS`.
    projection_seed: the seed A and B come from.
    train: "both" vectors, or only "d" or only "b" (Table 6). A vector that is
      not trained is not there: b counts as 1 and d, trained alone, starts at 0;
      d counts as `d_init`.
    sharing: "shared", one pair for all layers, or "unique", one a layer
      (Table 7).
    plan: a name in `contraction.PLANS`, or "auto": the cheapest for each shape.
    forwards: how often a training step runs the forward pass; 2 under remat.
  """
  if rank < 1:
    raise UserError(f"VeRA's rank is {rank}; it must be at least 1.")
  if train not in ("both", "d", "b"):
    raise UserError(f"train is {train!r}; choose both, d or b.")
  contraction.check_plan(plan)
  planned = partial(_plan, plan=plan, rank=rank, forwards=forwards)
  return Adapter(
    name="vera",
    projections=partial(
      make_projections,
      rank=rank,
      init=init,
      seed=projection_seed,
      sharing=sharing,
    ),
    init=partial(_init, rank=rank, d_init=d_init, train=train),
    forward=partial(_forward, d_init=d_init, plan=planned),
    kernel=partial(_kernel, d_init=d_init),
    plan=planned,
  )


def _init(inputs: int, outputs: int, *, rank: int, d_init: float, train: str):
  del inputs
  d = constant(0.0 if train == "d" else d_init)
  leaves = {
    D: lambda key: d(key, (rank,), jnp.float32),
    B_VECTOR: lambda key: jnp.zeros(outputs, jnp.float32),
  }
  return {k: v for k, v in leaves.items() if train == "both" or k[-1] == train}


def _plan(
  tokens: int, inputs: int, outputs: int, *, plan: str, rank: int, forwards: int
) -> str:
  if plan != contraction.AUTO:
    return plan
  return contraction.choose(tokens, rank, inputs, outputs, forwards=forwards)


def _vectors(leaves: Leaves, d_init: float) -> tuple[Array, Array]:
  """d and b; a vector that is not trained as one number."""
  one = jnp.ones(1)
  return leaves.get(D, d_init * one), leaves.get(B_VECTOR, one)


def _forward(
  leaves: Leaves,
  projections: Leaves,
  x: Float[Array, "*t i"],
  kernel: Float[Array, "i o"] | None = None,
  *,
  outputs: int,
  d_init: float,
  plan: Callable[[int, int, int], str],
) -> Float[Array, "*t o"]:
  A = projections["A"][:, : x.shape[-1]].astype(x.dtype)
  how = plan(math.prod(x.shape[:-1]), x.shape[-1], outputs)
  if kernel is not None and how != "factored":
    up = _up(leaves, projections, outputs=outputs, d_init=d_init)
    return contraction.FOLDING[how](x, kernel, A.T, up.astype(x.dtype))
  B = projections["B"][:outputs].astype(x.dtype)
  along = (1,) * (x.ndim - 1) + (-1,)
  d, b = (v.astype(x.dtype).reshape(along) for v in _vectors(leaves, d_init))
  delta = b * ((d * (x @ A.T)) @ B.T)
  return delta if kernel is None else x @ kernel + delta


def _up(
  leaves: Leaves, projections: Leaves, *, outputs: int, d_init: float
) -> Float[Array, "r o"]:
  """diag(d) B^T diag(b): what turns A x into the delta."""
  d, b = _vectors(leaves, d_init)
  return d[:, None] * projections["B"][:outputs].T * b[None]


def _kernel(
  leaves: Leaves,
  projections: Leaves,
  *,
  inputs: int,
  outputs: int,
  d_init: float,
) -> Float[Array, "i o"]:
  A = projections["A"][:, :inputs]
  up = _up(leaves, projections, outputs=outputs, d_init=d_init)
  return jnp.matmul(A.T, up, precision="highest")
