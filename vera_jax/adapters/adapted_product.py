"""The adapted product of one site: a method's, or those of a chain in turn."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from vera_jax.adapters.interface import Adapter, Leaves, LowRank, Site
from vera_jax.adapters.plans import (
  AUTO,
  FACTORED,
  WHOLE,
  Split,
  choose,
  no_factored,
)
from vera_jax.adapters.products import (
  Forward,
  Weights,
  factored,
  folded,
  folded_forward,
  folded_kernel,
  plus,
  scaled_up,
  thin_products,
)
from vera_jax.adapters.sites import is_on
from vera_jax.adapters.structured import Structured


def adapted_product(
  adapter: Adapter,
  leaves: Leaves,
  site: Site,
  x: Array,
  *,
  plan: str = AUTO,
  forwards: int = 1,
  split: Split = WHOLE,
  remake: bool = False,
  key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "*t o"], Float[Array, ""] | None]:
  """(x times the adapted weights, the methods' penalty or None).

  Args:
    adapter: the method, or a chain of methods, taken one after another.
    leaves: the site's.
    site: kernel and bias of x's type.
    x: (*t, i), or what else the layer's products take.
    plan, forwards, split: as in `choose`.
    remake: whether the backward pass makes the kernels that it needs again,
      from what they were made of, in place of keeping them all from the forward
      pass: for kernels that are stored in fewer bits.
    key: for methods that draw random numbers; None outside of training.
  """
  dtype = x.dtype if site.dtype is None else site.dtype
  rows = math.prod(x.shape[:-1]) if site.rows is None else site.rows
  site = site._replace(dtype=dtype, rows=rows)
  kept: Callable[[Forward], Forward] = jax.checkpoint if remake else _as_it_is
  penalties: list[Array] = []
  # Each link of a chain makes a new product of the last one's, and leaves the
  # site to the next link with the kernel as it is then.
  product = kept(by_weights(partial(_weights_of, site), site))
  links = [x for x in enumerate(adapter.methods) if is_on(x[1], site.path)]
  for number, link in links:
    link_leaves = link.own(leaves)
    after: Callable[[], Site] = partial(adapted_site, link, link_leaves, site)
    if link.forward is not None and (key is not None or link.low_rank is None):
      link_key = None if key is None else jax.random.fold_in(key, number)
      product = _by_forward(
        link, link_leaves, site, product, plan, kept, link_key, penalties
      )
      if link.draws:  # more than weights say, so that no kernel stands for it
        plan = FACTORED
    elif link.low_rank is not None:
      pick = partial(choose, plan=plan, forwards=forwards, split=split)
      product, folded_site = _by_plan(
        link, link_leaves, site, product, pick, split, kept
      )
      after = folded_site or after
    elif link.weights is not None:
      product = kept(by_weights(partial(link.weights, link_leaves, site), site))
    if link is not links[-1][1]:
      site = after()
  y = product(x)
  return y, jnp.sum(jnp.stack(penalties)) if penalties else None


def _by_forward(
  link: Adapter,
  leaves: Leaves,
  site: Site,
  inner: Forward,
  plan: str,
  kept: Callable[[Forward], Forward],
  key: PRNGKeyArray | None,
  penalties: list[Array],
) -> Forward:
  """The product that a method's own `forward` makes of the one so far."""

  def product(x: Array) -> Array:
    assert link.forward is not None and link.weights is not None
    made = link.forward(leaves, site, x, key, inner)
    if made is None:  # it leaves this site to its weights
      if plan == FACTORED:
        raise no_factored(site.path, site.view)
      return kept(by_weights(partial(link.weights, leaves, site), site))(x)
    y, penalty = made
    if penalty is not None:
      penalties.append(penalty)
    return y

  return product


def _by_plan(
  link: Adapter,
  leaves: Leaves,
  site: Site,
  inner: Forward,
  pick: Callable[..., str],
  split: Split,
  kept: Callable[[Forward], Forward],
) -> tuple[Forward, Callable[[], Site] | None]:
  """The product with a low-rank delta by the plan that suits it, and the site
  with the kernel that was made for that, if one was."""
  assert link.low_rank is not None and site.rows is not None
  factors = link.low_rank(leaves, site)
  how = pick(site.rows, factors, view=site.view, path=site.path)
  if how == FACTORED:
    thin = link.product or partial(thin_products, link.low_rank)
    delta = partial(thin, leaves, site)
    return partial(factored, inner=inner, delta=delta), None
  if split.up is not None:
    # Each device scales all of `up` that it multiplies with, and cuts its rows
    # from the `down` that it has. XLA would scale and cast parts, as the
    # kernel's lie, and gather them, `up` in float32.
    up = jax.lax.with_sharding_constraint(scaled_up(factors), split.up)
    down = factors.down
    if not isinstance(down, Structured):
      down = jax.lax.with_sharding_constraint(
        down.astype(site.dtype), split.down
      )
    factors = factors._replace(down=down, up=up, inner=None, outer=None)
  orders: dict[str, Callable[..., Array]] = {
    "folded": folded,
    "folded_forward": partial(folded_forward, split=split),
  }
  product = kept(partial(orders[how], site=site, factors=factors))
  return product, partial(_folded_site, site, factors)


def _as_it_is(product: Forward) -> Forward:
  return product


def by_weights(weights: Callable[[], Weights], site: Site) -> Forward:
  """The product with a kernel and a bias, made when it is called."""

  def product(x: Array) -> Array:
    kernel, bias = weights()
    return plus(site.multiply(x, kernel.astype(site.dtype)), bias)

  return product


def _weights_of(site: Site):
  return site.kernel(), site.bias


def adapted_site(link: Adapter, leaves: Leaves, site: Site) -> Site:
  """The site as a method leaves it to the next one of a chain."""
  if link.weights is None:
    return site
  weights = partial(link.weights, leaves, site)
  bias = site.bias if link.low_rank is not None else weights()[1]
  return site._replace(kernel=lambda: weights()[0], bias=bias)


def _folded_site(site: Site, factors: LowRank) -> Site:
  """The same behind a folded delta, whose kernel is made already."""
  return site._replace(kernel=partial(folded_kernel, site, factors))
