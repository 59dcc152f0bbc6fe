"""A small network with every layer kind, looped, scanned, rematerialised."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

LAYERS = 2


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    q, k, v = jnp.split(nn.Dense(24, name="fused")(x), 3, axis=-1)
    y = nn.DenseGeneral((2, 4), name="heads")(nn.tanh(q * k) + v)
    y = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")(y)
    return x + nn.tanh(y)


class Net(nn.Module):
  """`layout` is looped, scanned or remat (a scan of rematerialised layers)."""

  layout: str = "looped"

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="first")(x)
    if self.layout == "looped":
      for i in range(LAYERS):
        x = Block(name=f"layer_{i}")(x)
    else:
      block: Any = Block
      if self.layout == "remat":
        block = nn.remat(Block, prevent_cse=False)
      stack = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={True: 0},
        split_rngs={True: True},
        length=LAYERS,
      )
      x, _ = stack(block(name="layer"), x, None)
    return nn.Dense(3, name="classifier")(nn.LayerNorm(name="norm")(x))


def stacked(params: Any) -> Any:
  """A looped tree as the scanned network has it."""
  layers = [params[f"layer_{i}"] for i in range(LAYERS)]
  rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
  return {**rest, "layer": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


@pytest.fixture(scope="session")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(1), (4, 5))


@pytest.fixture(scope="session")
def base(x):
  """The looped network's first parameters, biases random too."""
  params = jax.jit(partial(Net().init, jax.random.key(0)))(x)["params"]
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      leaf + 0.1 * jax.random.normal(key, leaf.shape)
      for leaf, key in zip(leaves, keys, strict=True)
    ],
  )
