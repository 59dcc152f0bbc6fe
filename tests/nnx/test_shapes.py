"""A layer that has shapes and no equation, as MaxText's have, is adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vera_jax
import vera_jax.nnx
from vera_jax.errors import UserError
from vera_jax.nnx.layers import see_call


class DenseGeneral(nnx.Module):
  """With the fields of MaxText's, and what they say."""

  def __init__(self, ins, outs, rngs):
    self.in_features_shape, self.out_features_shape = ins, outs
    self.axis = tuple(range(-len(ins), 0))
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*ins, *outs)))

  def __call__(self, inputs, out_sharding=None):
    ins = len(self.axis)
    axes = tuple(range(inputs.ndim - ins, inputs.ndim)), tuple(range(ins))
    return jax.lax.dot_general(
      inputs,
      self.kernel.get_value(),
      (axes, ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      out_sharding=out_sharding,
    )


class Doubled(DenseGeneral):
  def __call__(self, inputs, out_sharding=None):
    return 2 * super().__call__(inputs, out_sharding)


class Model(nnx.Module):
  def __init__(self, kind, rngs):
    self.query = kind((6,), (2, 3), rngs)
    self.out = kind((2, 3), (5,), rngs)

  def __call__(self, x):
    return self.out(jnp.sin(self.query(x, out_sharding=None)))


@pytest.mark.parametrize(
  ("kind", "plan"), ((DenseGeneral, "factored"), (Doubled, "auto"))
)
def test_it_is_adapted_by_its_shapes(kind, plan):
  x = jax.random.normal(jax.random.key(0), (2, 4, 6))
  model = Model(kind, nnx.Rngs(0))
  expected = model(x)
  adapted = vera_jax.nnx.adapt(
    model, vera_jax.vera(rank=4), targets=["query", "out"], plan=plan
  )
  np.testing.assert_array_equal(adapted(x), expected)
  state = nnx.state(adapted, nnx.LoRAParam)
  keys = nnx.Rngs(1)
  nnx.update(
    adapted,
    jax.tree.map(lambda x: jax.random.normal(keys.params(), x.shape), state),
  )
  y = adapted(x)
  assert abs(y - expected).max() > 0.1
  merged = vera_jax.nnx.merge(adapted)(x)
  np.testing.assert_allclose(merged, y, rtol=2e-6, atol=2e-6 * abs(y).max())
  # what is more than the product is multiplied by the layer's own code
  call = see_call(model.query, kind, (x,), {})
  assert (call.own_code is None) == (kind is DenseGeneral)


def test_a_method_that_draws_needs_more_than_folding():
  model, x = Model(Doubled, nnx.Rngs(0)), jnp.ones((2, 4, 6))
  vera_jax.nnx.adapt(model, vera_jax.pvera(rank=4), targets=["query"])
  expected = model(x)
  with vera_jax.nnx.training(jax.random.key(0)):
    with pytest.raises(UserError, match="query is a Doubled .*only be folded"):
      model(x)
  np.testing.assert_array_equal(model(x), expected)
