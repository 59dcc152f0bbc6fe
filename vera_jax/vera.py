"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

  h = W0 x + b * (B (d * (A x)))                                  (equation 2)

A (r x in_max) and B (out_max x r) are one frozen random pair for the whole
network; a layer takes the leading columns of A and rows of B that it needs.
d (r) and b (out) are all that is trained. There is no alpha.

Einsum letters, here and in `lora.py`: r rank, i in, o out.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import constant
from jaxtyping import Float

from vera_jax.adapter import Adapter, Leaves
from vera_jax.errors import UserError
from vera_jax.projections import make_projections

D, B_VECTOR = "vera_d", "vera_b"


def vera(
  rank: int = 256,
  *,
  d_init: float = 0.1,
  init: str = "kaiming_uniform",
  projection_seed: int = 0,
  train: str = "both",
  sharing: str = "shared",
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
  """
  if rank < 1:
    raise UserError(f"VeRA's rank is {rank}; it must be at least 1.")
  if train not in ("both", "d", "b"):
    raise UserError(f"train is {train!r}; choose both, d or b.")
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
    forward=partial(_forward, d_init=d_init),
    kernel=partial(_kernel, d_init=d_init),
  )


def _init(inputs: int, outputs: int, *, rank: int, d_init: float, train: str):
  del inputs
  d = constant(0.0 if train == "d" else d_init)
  leaves = {
    D: lambda key: d(key, (rank,), jnp.float32),
    B_VECTOR: lambda key: jnp.zeros(outputs, jnp.float32),
  }
  return {k: v for k, v in leaves.items() if train == "both" or k[-1] == train}


def _forward(
  leaves: Leaves,
  projections: Leaves,
  x: Float[Array, "*t i"],
  *,
  outputs: int,
  d_init: float,
) -> Float[Array, "*t o"]:
  A = projections["A"][:, : x.shape[-1]].astype(x.dtype)
  B = projections["B"][:outputs].astype(x.dtype)
  d = _along_last_axis(leaves.get(D, jnp.float32(d_init)), x)
  b = _along_last_axis(leaves.get(B_VECTOR, jnp.float32(1)), x)
  return b * ((d * (x @ A.T)) @ B.T)


def _along_last_axis(vector: Array, x: Array) -> Array:
  """The vector in the type of x and with as many axes."""
  return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _kernel(
  leaves: Leaves,
  projections: Leaves,
  *,
  inputs: int,
  outputs: int,
  d_init: float,
) -> Float[Array, "i o"]:
  A, B = projections["A"][:, :inputs], projections["B"][:outputs]
  d = jnp.broadcast_to(leaves.get(D, jnp.float32(d_init)), len(A))
  b = leaves.get(B_VECTOR, jnp.ones(outputs))
  return jnp.einsum("ri,r,or,o->io", A, d, B, b, precision="highest")
