"""A method on one of the networks of `architectures.py`, and what must hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.architectures import Recurrent
from tests.adapters.test_every_method import perturb
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.interface import EMPTY
from vera_jax.adapters.merge import merge
from vera_jax.adapters.sites import first_leaves, make_shared
from vera_jax.adapters.tracing import init_shapes

RANK = 5  # no layer's width
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 7, (2, 6)))


@partial(jax.jit, static_argnums=0)
def plain(model, params, x):
  """The network without an adapter; compiled once for all methods."""
  return model.apply({"params": params}, x)


class Ready:
  """A method on a network: module, variables, targets, leaves moved away."""

  def __init__(self, model, adapter, targets, x, *, fused=EMPTY, **options):
    self.model, self.adapter, self.x = model, adapter, x
    self.module = adapt(model, adapter, targets=targets, fused=fused, **options)
    shapes = init_shapes(model, x)["params"]
    rng = np.random.default_rng(1)
    base = jax.tree.map(
      lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32),
      shapes,
    )
    self.targets = self.module.find_targets(x)
    self.projections = make_shared(adapter, self.targets, base)
    key = jax.random.key(0)
    made = first_leaves(adapter, self.targets, base, self.projections, key)
    self.start = unflatten_dict(flatten_dict(base) | flatten_dict(made))
    self.moved = perturb(self.start, adapter)

  def own(self, params):
    flat = flatten_dict(params)
    return {p: x for p, x in flat.items() if self.adapter.owns(p[-1])}

  def adapted(self, params, **options):
    module = self.module.clone(**options)
    variables = {"params": params}
    if self.projections:
      variables["projections"] = self.projections
    return module.apply(variables, self.x)

  def base(self, params):
    """The base's part of these parameters."""
    flat = flatten_dict(params)
    return unflatten_dict(
      {p: x for p, x in flat.items() if not self.adapter.owns(p[-1])}
    )

  def merged(self, params):
    return merge(
      params, self.projections, adapter=self.adapter, targets=self.targets
    )

  def check(self, *plans):
    """Equal to the base at the start and to the merged network later.

    Returns:
      By plan, the gradients of the leaves of the outputs' summed sines.
    """

    def loss(own, plan):
      params = unflatten_dict(flatten_dict(self.moved) | own)
      y = self.adapted(params, plan=plan)
      return jnp.sum(jnp.sin(y)), y

    adapted = jax.jit(self.adapted)
    base = plain(self.model, self.base(self.start), self.x)
    merged = plain(self.model, self.merged(self.moved), self.x)
    start = adapted(self.start)
    np.testing.assert_allclose(start, base, rtol=0, atol=1e-6)
    np.testing.assert_allclose(adapted(self.moved), merged, rtol=0, atol=1e-5)
    assert np.abs(merged - base).max() > 1e-2
    found = {}
    for plan in plans:
      gradient = jax.jit(jax.grad(partial(loss, plan=plan), has_aux=True))
      found[plan], y = gradient(self.own(self.moved))
      np.testing.assert_allclose(y, merged, rtol=0, atol=1e-5)
    return found

  def check_gradients(self, found, delta):
    """Against those of the network in float64 with W0 + delta in its place.

    Args:
      found: gradients by leaf.
      delta: (A, B, d, b, kernel's shape) -> what VeRA adds to the kernel.
    """
    with jax.enable_x64(True):
      moved = jax.tree.map(np.float64, flatten_dict(self.moved))
      model = self.model
      if isinstance(model, Recurrent):
        model = model.clone(param_dtype=np.float64)
      A, B = (np.float64(self.projections[name]) for name in "AB")

      def loss(own):
        flat = {**moved, **own}
        for path in self.targets:
          d, b = flat[*path, "vera_d"], flat[*path, "vera_b"]
          kernel = flat[*path, "kernel"]
          flat[*path, "kernel"] = kernel + delta(A, B, d, b, kernel.shape)
        base = {p: x for p, x in flat.items() if not p[-1].startswith("vera")}
        y = model.apply({"params": unflatten_dict(base)}, self.x)
        return jnp.sum(jnp.sin(y))

      expected = jax.jit(jax.grad(loss))({p: moved[p] for p in found})
    for path, gradient in found.items():
      want = expected[path]
      assert want.dtype == np.float64 and np.abs(want).max() > 0
      np.testing.assert_allclose(
        gradient, want, rtol=0, atol=1e-4 * max(1, np.abs(want).max())
      )


def by_definition(A, B, d, b, shape):
  """The kernel as a matrix: A's columns for all taps and channels at once."""
  inputs = int(np.prod(shape[:-1]))
  delta = jnp.einsum("ri,r,or,o->io", A[:, :inputs], d, B[: shape[-1]], b)
  return delta.reshape(shape)
