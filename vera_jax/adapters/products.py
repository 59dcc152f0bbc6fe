"""How an adapted product is multiplied out, and what each order costs.

A low-rank delta `down @ up` of a kernel W0, of shapes (i, r) and (r, o), can be
multiplied with x in several orders. With t rows of x, one training step costs,
beside x @ W0 and its input gradient, as many multiply-adds as `costs` says:

  factored        x @ W0 + (x @ down) @ up: as papers write it
  folded          x @ (W0 + down @ up): one kernel per step, whose gradient
                  x^T g is a matrix of W0's size that goes on to `up`
  folded_forward  folded, but with a low-rank gradient: that of `up` is
                  (x @ down)^T g

All are the same function with the same gradients. Factored is for few rows or
a low rank, folded for many rows, folded_forward for what lies between. Several
layers on one input need x @ down once: XLA merges equal products. A matrix may
be structured: then its products cost what they cost.

They are the same up to rounding, which in bfloat16 is no small thing: the sum
of W0's part and the delta's has eight bits of mantissa, in every plan. Of a
delta of 10 % of W0's norm the output keeps all but 2 to 3 %, of one of 1 % all
but a sixth to a quarter, of one of 0.1 % nearly nothing. The gradients of the
trained leaves stay right within 2 % at any size, so that training goes on and
the delta grows. float32 keeps all of it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from vera_jax.adapters.interface import (
  MATRIX,
  PLANS,
  Adapter,
  Leaves,
  LowRank,
  Matrix,
  Path,
  Site,
  View,
)
from vera_jax.adapters.sites import is_on
from vera_jax.adapters.structured import Structured
from vera_jax.errors import UserError

Forward = Callable[[Array], Array]  # x -> x times the weights so far
AUTO, FACTORED = "auto", "factored"


def check_plan(name: str) -> str:
  """The name itself; a UserError where it is no plan's, nor "auto"."""
  if name not in (AUTO, *PLANS):
    raise UserError(
      f"contraction is {name!r}; choose {AUTO}, {', '.join(PLANS)}."
    )
  return name


def costs(
  tokens: int,
  factors: LowRank,
  *,
  forwards: int = 1,
  view: View = MATRIX,
) -> dict[str, int]:
  """Multiply-adds that a delta costs per training step, by plan.

  Args:
    tokens: rows of x.
    factors: the delta's; their shapes alone are read. In factored form the
      gradients of vectors that scale fixed matrices need no product.
    forwards: how often a step runs the forward pass: twice with remat.
    view: of the layer's kernel. Where x are row numbers, rows of `down` are
      taken; where the layer forms matrices, x @ down is a dense product.
  """
  down, up = factors.down, factors.up
  (inputs, rank), outputs = down.shape, up.shape[-1]
  to_thin = tokens * inputs * rank if view.forms else _cost(down, tokens)
  to_kernel = tokens * inputs * outputs
  if view.looked_up:
    to_thin = to_kernel = 0
  build = _cost(down, outputs)
  formed = _cost(up, rank) if isinstance(up, Structured) else 0
  formed_down = 0
  if view.forms and isinstance(down, Structured):
    formed_down = _cost(down, rank)
  to_down, to_up = int(factors.trains_down), int(factors.trains_up)
  scales = factors.inner is not None or factors.outer is not None
  plans = {
    "factored": (forwards + 1) * (to_thin + _cost(up, tokens))
    + to_down * to_thin
    + to_up * tokens * rank * outputs
    + forwards * formed_down,
    # to trained vectors, too, the gradient goes by way of that of `up`
    "folded": (forwards + to_down + int(to_up or scales)) * build
    + forwards * formed
    + to_kernel,
  }
  if not factors.trains_down:
    backward = formed_down + to_thin + tokens * rank * outputs
    plans["folded_forward"] = forwards * (build + formed) + backward
  return plans


def _cost(matrix: Matrix, vectors: int) -> int:
  """Multiply-adds of its product with as many vectors."""
  if isinstance(matrix, Structured):
    return matrix.cost(vectors)
  return vectors * math.prod(matrix.shape)


def choose(
  tokens: int,
  factors: LowRank,
  *,
  plan: str = AUTO,
  forwards: int = 1,
  view: View = MATRIX,
  path: Path = (),
) -> str:
  """The plan that is asked for, or for "auto" the cheapest for these shapes.

  Where the layer's kind does not allow the plan, the cheapest of those that it
  allows; but what is not to be folded, as in a bank, never is. The path is for
  messages.

  Raises:
    UserError: the method or the layer has no such plan.
  """
  if plan == FACTORED and plan not in view.plans:
    raise no_factored(path, view)
  if plan == "folded_forward" and factors.trains_down:
    raise UserError(
      f"There is no folded_forward plan for {'/'.join(path)}: its delta's first"
      " matrix depends on trained numbers. Choose auto, factored or folded."
    )
  if plan in view.plans:
    return plan
  priced = costs(tokens, factors, forwards=forwards, view=view)
  return min((x for x in priced if x in view.plans), key=lambda x: priced[x])


def no_factored(path: Path, view: View) -> UserError:
  """Of a layer whose adapted kernel would be made under the factored plan."""
  return UserError(
    f"The adapted kernel of {'/'.join(path)} ({view.kind}) can be made only"
    " as a whole here: it has no factored plan, which a bank of adapters takes"
    " too. Choose auto or folded; answer by a Predictor for each adapter."
  )


def scaled(x: Array, vector: Array | None) -> Array:
  """x with its last axis scaled, in x's type."""
  if vector is None:
    return x
  return x * along_last(vector.astype(x.dtype), x)


def along_last(vector: Float[Array, " _"], x: Array) -> Array:
  """The vector in a shape in which it meets x's last axis."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def whole_up(factors: LowRank) -> Float[Array, "r o"]:
  """diag(inner) @ up @ diag(outer): what turns x @ down into the delta."""
  up = factors.up
  if isinstance(up, Structured):
    up = up.matrix()
  if factors.outer is not None:
    up = up * factors.outer[None]
  return up if factors.inner is None else factors.inner[:, None] * up


def add_low_rank(
  low_rank: Callable[[Leaves, Site], LowRank],
) -> Callable[[Leaves, Site], tuple[Array, Array | None]]:
  """The `weights` of a method whose adapted kernel is kernel + delta."""

  def weights(leaves: Leaves, site: Site) -> tuple[Array, Array | None]:
    factors = low_rank(leaves, site)
    with jax.default_matmul_precision("highest"):
      delta = factors.down @ whole_up(factors)
    return site.kernel().astype(jnp.float32) + delta, site.bias

  return weights


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def folded_forward(
  multiply: Callable[[Array, Array], Array],
  project: Callable[[Array, Matrix], Array],
  x: Array,
  kernel: Float[Array, "i o"],
  down: Matrix,
  up: Float[Array, "r o"],
) -> Float[Array, "*t o"]:
  """x times kernel + down @ up; the gradient of `up` goes by way of x @ down.

  `multiply` and `project` are the layer's products with its kernel and with
  `down`.
  """
  return multiply(x, fold(kernel, down, up))


def _folded_forward(multiply, project, x, kernel, down, up):
  whole = fold(kernel, down, up)
  return multiply(x, whole), (x, whole, down, up)


def _low_rank_backward(multiply, project, saved, g):
  x, whole, down, up = saved
  _, backward = jax.vjp(multiply, x, whole)
  to_x, to_kernel = backward(g)  # for a frozen kernel that is dead code
  to_down = None if isinstance(down, Structured) else to_kernel @ up.T
  thin = project(x, down)
  to_up = thin.reshape(-1, thin.shape[-1]).T @ g.reshape(-1, g.shape[-1])
  return to_x, to_kernel, to_down, to_up


folded_forward.defvjp(_folded_forward, _low_rank_backward)


def adapted_product(
  adapter: Adapter,
  leaves: Leaves,
  site: Site,
  x: Array,
  *,
  multiply: Callable[[Array, Array], Array] = jnp.matmul,
  dtype: DTypeLike | None = None,
  rows: int | None = None,
  plan: str = AUTO,
  forwards: int = 1,
  remake: bool = False,
  key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "*t o"], Float[Array, ""] | None]:
  """(x times the adapted weights, the method's penalty or None).

  Args:
    adapter: the method, or a chain of methods, taken one after another.
    leaves: the site's.
    site: kernel and bias of x's type.
    x: (*t, i), or what else the layer's products take.
    multiply: the layer's own (x, kernel) -> product.
    dtype: of the kernel in it; x's, if None.
    rows: of the product; those of x, if None.
    plan, forwards: as in `choose`.
    remake: whether the backward pass makes the kernels that it needs again,
      from what they were made of, in place of keeping them all from the forward
      pass: for kernels that are stored in fewer bits.
    key: for methods that draw random numbers; None outside of training.
  """
  dtype = x.dtype if dtype is None else dtype
  penalties: list[Array] = []
  drawn = False  # whether the product so far may be more than its weights say

  again: Callable[[Forward], Forward] = jax.checkpoint if remake else _as_it_is

  def of_weights(
    weights: Callable[[], tuple[Array, Array | None]],
  ) -> Forward:
    def product(x: Array) -> Array:
      kernel, bias = weights()
      return plus(multiply(x, kernel.astype(dtype)), bias)

    return again(product)

  def of_low_rank(
    inner: Forward, site: Site, factors: LowRank
  ) -> tuple[Forward, Site | None]:
    """The product, and the site by its kernel, where that is made for it."""
    tokens = math.prod(x.shape[:-1]) if rows is None else rows
    how = choose(
      tokens,
      factors,
      plan=FACTORED if drawn else plan,
      forwards=forwards,
      view=site.view,
      path=site.path,
    )
    if how == FACTORED:

      def beside(x: Array) -> Array:
        y = inner(x)
        thin = site.project(x, factors.down.astype(dtype))
        thin = scaled(thin, factors.inner) @ factors.up.astype(dtype)
        return y + scaled(thin, factors.outer).astype(y.dtype)

      return beside, None
    down = factors.down.astype(dtype)
    up = whole_up(factors).astype(dtype)

    def kernel() -> Array:
      return site.kernel().astype(dtype)

    def whole() -> Array:
      return fold(kernel(), down, up)

    known = site._replace(kernel=whole)
    if how == "folded":
      return of_weights(lambda: (whole(), site.bias)), known

    def product(x: Array) -> Array:
      y = folded_forward(multiply, site.project, x, kernel(), down, up)
      return plus(y, site.bias)

    return again(product), known

  def of_forward(
    link: Adapter, own: Leaves, site: Site, key: Any, inner: Forward
  ) -> Forward:
    def product(x: Array) -> Array:
      assert link.forward is not None and link.weights is not None
      made = link.forward(own, site, x, key, inner)
      if made is None:
        if plan == FACTORED:
          raise no_factored(site.path, site.view)
        return of_weights(partial(link.weights, own, site))(x)
      y, penalty = made
      if penalty is not None:
        penalties.append(penalty)
      return y

    return product

  def base(x: Array, site: Site = site) -> Array:
    return of_weights(lambda: (site.kernel(), site.bias))(x)

  product: Forward = base
  here = [x for x in enumerate(adapter.methods) if is_on(x[1], site.path)]
  for number, link in here:
    own, known = link.own(leaves), None
    if link.forward is not None and (key is not None or not link.low_rank):
      own_key = None if key is None else jax.random.fold_in(key, number)
      product = of_forward(link, own, site, own_key, product)
      drawn = drawn or link.draws
    elif link.low_rank is not None:
      product, known = of_low_rank(product, site, link.low_rank(own, site))
    elif link.weights is not None:
      product = of_weights(partial(link.weights, own, site))
    if link is not here[-1][1]:
      site = known or adapted_site(link, own, site)
  y = product(x)
  return y, jnp.sum(jnp.stack(penalties)) if penalties else None


def adapted_site(link: Adapter, own: Leaves, site: Site) -> Site:
  """The site as a method leaves it to the next one of a chain."""
  if link.weights is None:
    return site
  weights = partial(link.weights, own, site)
  bias = site.bias if link.low_rank is not None else weights()[1]
  return site._replace(kernel=lambda: weights()[0], bias=bias)


def _as_it_is(product: Forward) -> Forward:
  return product


def plus(y: Float[Array, "*t o"], bias: Array | None) -> Float[Array, "*t o"]:
  """y and a bias (o,), in y's type."""
  if bias is None:
    return y
  return y + along_last(bias.astype(y.dtype), y)
