"""The order in which x @ (W0 + delta) is multiplied out, and its cost.

The delta of a layer is `down @ up`, of shapes (i, r) and (r, o). With t tokens,
one training step costs, beside x @ W0 and its input gradient, as many
multiply-adds as `costs` says:

  factored  x @ W0 + (x @ down) @ up: what a paper writes
  folded    x @ (W0 + down @ up): one kernel a step, whose gradient x^T g is a
            matrix of W0's size that goes on to `up`
  mixed     folded, but the gradient of `up` comes from (x @ down)^T g

All are the same function with the same gradients. Factored is for few tokens or
a low rank, folded for many tokens, mixed for what lies between. Several layers
on one input need x @ down once: XLA merges equal products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.errors import UserError

PLANS = ("factored", "folded", "mixed")
AUTO = "auto"


def check_plan(name: str) -> None:
  """Raises a UserError for a name that is neither a plan nor "auto"."""
  if name not in (AUTO, *PLANS):
    raise UserError(
      f"contraction is {name!r}; choose {AUTO}, {', '.join(PLANS)}."
    )


def costs(
  tokens: int, rank: int, inputs: int, outputs: int, *, forwards: int = 1
) -> dict[str, int]:
  """Multiply-adds that a delta costs a training step, by plan.

  For `up` that is a fixed matrix scaled by trained vectors, as VeRA's is: its
  factored form needs no product for their gradients.

  Args:
    tokens: rows of x.
    rank: r; `inputs`, `outputs`: i and o.
    forwards: how often a step runs the forward pass: twice with remat.
  """
  thin = tokens * rank * (inputs + outputs)
  build = rank * inputs * outputs
  return {
    "factored": (forwards + 1) * thin,
    "folded": (forwards + 1) * build + tokens * inputs * outputs,
    "mixed": forwards * build + thin,
  }


def choose(
  tokens: int, rank: int, inputs: int, outputs: int, *, forwards: int = 1
) -> str:
  """The cheapest plan for these shapes; see `costs`."""
  priced = costs(tokens, rank, inputs, outputs, forwards=forwards)
  return min(PLANS, key=lambda plan: priced[plan])


def fold(
  kernel: Float[Array, "i o"],
  down: Float[Array, "i r"],
  up: Float[Array, "r o"],
) -> Float[Array, "i o"]:
  """kernel + down @ up, added in float32 or what is finer."""
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  delta = jnp.matmul(down, up, preferred_element_type=wide)
  return (kernel + delta).astype(kernel.dtype)


def folded(
  x: Float[Array, "*t i"],
  kernel: Float[Array, "i o"],
  down: Float[Array, "i r"],
  up: Float[Array, "r o"],
) -> Float[Array, "*t o"]:
  """x @ (kernel + down @ up)."""
  return x @ fold(kernel, down, up)


@jax.custom_vjp
def mixed(
  x: Float[Array, "*t i"],
  kernel: Float[Array, "i o"],
  down: Float[Array, "i r"],
  up: Float[Array, "r o"],
) -> Float[Array, "*t o"]:
  """`folded`, with the gradient of `up` by way of x @ down."""
  return folded(x, kernel, down, up)


def _mixed_forward(x, kernel, down, up):
  whole = fold(kernel, down, up)
  return x @ whole, (x, whole, down, up)


def _mixed_backward(saved, g):
  x, whole, down, up = saved
  rows, back = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
  to_kernel = rows.T @ back  # for a frozen kernel this line is dead code
  to_up = (rows @ down).T @ back
  return g @ whole.T, to_kernel, to_kernel @ up.T, to_up


mixed.defvjp(_mixed_forward, _mixed_backward)

Product = Callable[[Array, Array, Array, Array], Array]
FOLDING: dict[str, Product] = {"folded": folded, "mixed": mixed}
