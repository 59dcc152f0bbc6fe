"""An adapter on an nnx model is the same adapter on the linen model."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import vera_jax
import vera_jax.nnx
from vera_jax.errors import UserError
from vera_jax.nnx.adapt import modules_of, named, tree_of

TOKENS = jnp.arange(10).reshape(2, 5)
TARGETS = ["embed", "layers_.", "query", "out", "ein", "conv"]
EQUATION = "...d,dnh->...nh"


class Model(nnx.Module):
  """One layer of each kind, and two in a list."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 8, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
    self.query = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    self.out = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
    self.ein = nnx.Einsum(EQUATION, (8, 2, 3), (2, 3), rngs=rngs)
    self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = nnx.gelu(layer(x))
    x = x + self.out(jnp.sin(self.query(x)))
    outputs = self.ein(x), self.conv(x), self.embed.attend(x)
    return jnp.concatenate([y.reshape(2, 5, -1) for y in outputs], axis=-1)


class Linen(nn.Module):
  """The same."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 8, name="embed")
    x = embed(tokens)
    for number in range(2):
      x = nn.gelu(nn.Dense(8, name=f"layers_{number}")(x))
    y = nn.DenseGeneral((2, 3), name="query")(x)
    x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(jnp.sin(y))
    outputs = (
      nn.Einsum((8, 2, 3), EQUATION, name="ein")(x),
      nn.Conv(4, (3,), name="conv")(x),
      embed.attend(x),
    )
    return jnp.concatenate([y.reshape(2, 5, -1) for y in outputs], axis=-1)


METHODS = {
  "vera": vera_jax.vera(rank=16),
  "factored": vera_jax.vera(rank=3),
  "unique": vera_jax.vera(rank=4, sharing="unique"),
  "lora": vera_jax.lora(rank=2),
  "lora_fa": vera_jax.lora_fa(rank=2),
  "lora_xs": vera_jax.lora_xs(rank=2),
  "ia3": vera_jax.ia3(),
  "dora": vera_jax.dora(rank=2),
  "dvora": vera_jax.dvora(rank=4),
  "randlora": vera_jax.randlora(rank=2),
  "unilora": vera_jax.unilora(rank=2, size=50),
  "pvera": vera_jax.pvera(rank=4),
  "onelora": vera_jax.onelora(),
  "chain": vera_jax.chain(vera_jax.lora(rank=2), vera_jax.ia3()),
}


def moved(tree):
  """The leaves after a step that is no symmetric one."""
  flat = flatten_dict(tree)
  return unflatten_dict(
    {
      path: leaf
      + 0.1
      * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype) + i).reshape(leaf.shape)
      for i, (path, leaf) in enumerate(sorted(flat.items()))
    }
  )


def set_leaves(model, tree):
  flat = flatten_dict(tree)
  for path, module in modules_of(model).items():
    for name, variable in vars(module).items():
      if isinstance(variable, nnx.LoRAParam):
        variable.set_value(flat[*path, name])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_linens(name):
  adapter = METHODS[name]
  model = Model(nnx.Rngs(0))
  base, before = tree_of(model), model(TOKENS)
  model = vera_jax.nnx.adapt(model, adapter, targets=TARGETS, rngs=nnx.Rngs(1))
  adapted = vera_jax.adapt(Linen(), adapter, targets=TARGETS)
  key = nnx.Rngs(1).params()
  variables = adapted.init_on({"params": base}, key, TOKENS)
  first = flatten_dict(variables["params"])
  projections = flatten_dict(variables.get("projections", {}))
  for path, leaf in flatten_dict(tree_of(model)).items():
    expected = first[path] if path in first else projections[path]
    np.testing.assert_array_equal(leaf, expected)
  if name != "unilora":  # it starts from random numbers
    np.testing.assert_allclose(model(TOKENS), before, rtol=1e-6, atol=1e-6)

  own = {p: leaf for p, leaf in first.items() if adapter.owns(p[-1])}
  own = moved(unflatten_dict(own))
  set_leaves(model, own)

  @nnx.jit
  def ours(model):
    def loss(model):
      y = model(TOKENS)
      return jnp.sum(jnp.sin(y)), y

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    (_, y), gradient = nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(
      model
    )
    return y, gradient, vera_jax.nnx.merge(model)(TOKENS)

  @jax.jit
  def linens(own):
    def loss(own):
      params = vera_jax.join(unflatten_dict(first), own)
      y = adapted.apply({**variables, "params": params}, TOKENS)
      return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(own)
    return y, gradient

  y, gradient, merged = ours(model)
  expected, linen_gradient = linens(own)
  close = partial(np.testing.assert_allclose, rtol=2e-6)
  close(y, expected, atol=1e-6 * abs(expected).max())
  close(merged, y, atol=2e-6 * abs(expected).max())
  gradient = {
    named(path): x
    for path, x in flatten_dict(nnx.to_pure_dict(gradient)).items()
  }
  for path, leaf in flatten_dict(linen_gradient).items():
    close(gradient[path], leaf, atol=2e-6 * abs(leaf).max())
