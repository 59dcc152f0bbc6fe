"""How an adapted product is multiplied out: three plans.

A low-rank delta `down @ up` of a kernel W0, of shapes (i, r) and (r, o), can be
multiplied with x in several orders:

  factored        x @ W0 + (x @ down) @ up: as papers write it
  folded          x @ (W0 + down @ up): one kernel per step, whose gradient
                  x^T g is a matrix of W0's size that goes on to `up`
  folded_forward  folded, but with a low-rank gradient: that of `up` is
                  (x @ down)^T g

All are the same function with the same gradients. `plans.py` chooses the
cheapest by counting, and `adapted_product.py` takes the methods of a chain one
after another.

They are the same up to rounding, which in bfloat16 is no small thing: the sum
of W0's part and the delta's has eight bits of mantissa, in every plan. A delta
of 10 % of W0's norm reaches the output with an error of 2 to 3 % of itself, one
of 1 % with 14 to 29 %, and most of one of 0.1 % is lost. The gradients of the
trained leaves stay right within 2 % at these sizes, so that training goes on
and the delta grows. float32 keeps all of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from vera_jax.adapters.interface import (
  Leaves,
  LowRank,
  Matrix,
  Site,
)
from vera_jax.adapters.plans import WHOLE, Split
from vera_jax.adapters.structured import Structured, as_array
from vera_jax.operations.precision import exact

Forward = Callable[[Array], Array]  # x -> x times the weights so far
Weights = tuple[Array, Array | None]  # a kernel (i, o) and its bias (o,)


def factored(
  x: Array, *, inner: Forward, delta: Forward
) -> Float[Array, "*t o"]:
  """x @ W0 + (x @ down) @ up; no kernel is made.

  Args:
    x: (*t, i), or what else the layer's products take.
    inner: the product so far.
    delta: x times the delta, by two thin products.
  """
  y = inner(x)
  return y + delta(x).astype(y.dtype)


def folded(x: Array, *, site: Site, factors: LowRank) -> Float[Array, "*t o"]:
  """x @ (W0 + down @ up); the gradient of `up` goes by way of the kernel's."""
  return plus(site.multiply(x, folded_kernel(site, factors)), site.bias)


def folded_forward(
  x: Array, *, site: Site, factors: LowRank, split: Split = WHOLE
) -> Float[Array, "*t o"]:
  """As `folded`, but the gradient of `up` is (x @ down)^T g, in which no matrix
  of the kernel's size is made."""

  @jax.custom_vjp
  def product(x: Array, kernel: Array, down: Matrix, up: Array) -> Array:
    return site.multiply(x, fold(kernel, down, up))

  def forward(x: Array, kernel: Array, down: Matrix, up: Array):
    adapted = fold(kernel, down, up)
    return site.multiply(x, adapted), (x, adapted, down, up)

  def backward(saved, g):
    x, adapted, down, up = saved
    _, through = jax.vjp(site.multiply, x, adapted)
    to_x, to_kernel = through(g)  # for a frozen kernel that is dead code
    to_down = None if isinstance(down, Structured) else to_kernel @ up.T
    thin = site.project(x, down)
    thin = thin.reshape(-1, thin.shape[-1])
    if split.thin is not None and thin.shape[-1] % split.tensor == 0:
      # each device along `tensor` has x, and would else compute all of it
      thin = jax.lax.with_sharding_constraint(thin, split.thin)
    to_up = thin.T @ g.reshape(-1, g.shape[-1])
    return to_x, to_kernel, to_down, to_up

  product.defvjp(forward, backward)
  kernel = site.kernel().astype(site.dtype)
  down = factors.down.astype(site.dtype)
  y = product(x, kernel, down, scaled_up(factors).astype(site.dtype))
  return plus(y, site.bias)


def folded_kernel(site: Site, factors: LowRank) -> Float[Array, "i o"]:
  """The site's kernel with the delta in it, as it is multiplied with."""
  kernel = site.kernel().astype(site.dtype)
  down = factors.down.astype(site.dtype)
  return fold(kernel, down, scaled_up(factors).astype(site.dtype))


def fold(
  kernel: Float[Array, "i o"],
  down: Matrix,
  up: Float[Array, "r o"],
) -> Float[Array, "i o"]:
  """kernel + down @ up, added in float32 or what is finer."""
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  if isinstance(down, Structured):
    delta = (down @ up).astype(wide)
  else:
    delta = jnp.matmul(down, up, preferred_element_type=wide)
  return (kernel + delta).astype(kernel.dtype)


def scaled_up(factors: LowRank) -> Float[Array, "r o"]:
  """diag(inner) @ up @ diag(outer): what turns x @ down into the delta."""
  up = factors.up
  if isinstance(up, Structured):
    up = up.matrix()
  if factors.outer is not None:
    up = up * factors.outer[None]
  return up if factors.inner is None else factors.inner[:, None] * up


def exact_factors(
  factors: LowRank,
) -> tuple[Float[Array, "i n"], Float[Array, "n o"]]:
  """The same delta as a product of two plain matrices: LoRA's A and B.

  n is r, or the smaller of i and o where r is larger: there the wide rows are
  written in an orthonormal basis of their span (QR), which loses nothing.
  """
  down, up = (as_array(x, jnp.float32) for x in (factors.down, factors.up))
  down, up = scaled(down, factors.inner), scaled(up, factors.outer)
  inputs, outputs = down.shape[0], up.shape[1]
  if down.shape[1] <= min(inputs, outputs):
    return down, up
  if inputs <= outputs:
    basis, triangle = jnp.linalg.qr(down.T)
    return triangle.T, basis.T @ up
  basis, triangle = jnp.linalg.qr(up)
  return down @ basis, triangle


def thin_products(
  low_rank: Callable[[Leaves, Site], LowRank],
  leaves: Leaves,
  site: Site,
  x: Array,
) -> Float[Array, "*t o"]:
  """outer * ((inner * (x @ down)) @ up): x times a delta of two matrices."""
  factors = low_rank(leaves, site)
  thin = site.project(x, factors.down.astype(site.dtype))
  thin = scaled(thin, factors.inner) @ factors.up.astype(site.dtype)
  return scaled(thin, factors.outer)


def add_low_rank(
  low_rank: Callable[[Leaves, Site], LowRank],
) -> Callable[[Leaves, Site], Weights]:
  """The `weights` of a method whose adapted kernel is kernel + delta."""

  def weights(leaves: Leaves, site: Site) -> Weights:
    with exact():
      factors = low_rank(leaves, site)
      delta = factors.down @ scaled_up(factors)
    return site.kernel().astype(jnp.float32) + delta, site.bias

  return weights


def scaled(x: Array, vector: Array | None) -> Array:
  """x with its last axis scaled, in x's type."""
  if vector is None:
    return x
  return x * along_last(vector.astype(x.dtype), x)


def along_last(vector: Float[Array, " _"], x: Array) -> Array:
  """The vector in a shape in which it meets x's last axis."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def plus(y: Float[Array, "*t o"], bias: Array | None) -> Float[Array, "*t o"]:
  """y and a bias (o,), in y's type."""
  if bias is None:
    return y
  return y + along_last(bias.astype(y.dtype), y)
