"""scenic's layers: its own attention, masked convolutions, residuals with
gates, squeeze and excite, and steps of adaptive computation."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.adapters.others.other import HEADS, Other, normal


class MultiHeadAttention(nn.Module):
  """Positions are added to queries and keys; the heads' layers have a
  precision of their own."""

  @nn.compact
  def __call__(self, x, place):
    dense = partial(
      nn.DenseGeneral,
      axis=-1,
      features=(2, 3),
      precision=jax.lax.Precision.HIGHEST,
    )
    q = dense(name="query")(x + place)
    k = dense(name="key")(x + place)
    v = dense(name="value")(x)
    y = nn.dot_product_attention(q, k, v)
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(y)


class Residual(nn.Module):
  """x and a part's result y, put together by gates."""

  kind: str

  @nn.compact
  def __call__(self, x, y):
    dense = partial(nn.Dense, x.shape[-1])
    bare = partial(dense, use_bias=False)
    if self.kind == "highway":
      gate = nn.sigmoid(dense()(x))
      return (1 - gate) * x + gate * y
    if self.kind == "sigtanh":
      return x + nn.sigmoid(dense()(y)) * nn.tanh(bare()(y))
    reset = nn.sigmoid(bare()(x) + bare()(y))
    shift = self.param("b_g", nn.initializers.ones, (x.shape[-1],))
    update = nn.sigmoid(bare()(x) + bare()(y) - shift[None, None])
    new = nn.tanh(bare()(y) + bare()(reset * x))
    return (1 - update) * x + update * new


class Identity(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x


class Encoder(nn.Module):
  @nn.compact
  def __call__(self, x):
    place = self.param(
      "posembed", nn.initializers.normal(0.5), (1, *x.shape[1:])
    )
    for kind in ("gated", "highway", "sigtanh"):
      y = MultiHeadAttention()(nn.LayerNorm()(x), place)
      x = Residual(kind)(x, y)
      y = Identity(name=f"mlp_{kind}")(nn.gelu(nn.Dense(6)(x)))
      x = x + nn.Dense(x.shape[-1])(y)
    return x


class MaskedConv(nn.Conv):
  """flax's convolution, with what is beyond an image's own size set to 0; the
  sizes are returned, too."""

  @nn.compact
  def __call__(self, x, sizes):  # type: ignore[override]
    y = super().__call__(x)
    sizes = (sizes - 1) // self.strides + 1
    rows = jnp.arange(y.shape[1])[None] < sizes[:, :1]
    columns = jnp.arange(y.shape[2])[None] < sizes[:, 1:]
    mask = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(mask, y, 0), sizes


class SqueezeAndExcite(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Dense(x.shape[-1] // 2)(x.mean((1, 2))))
    return x * nn.sigmoid(nn.Dense(x.shape[-1])(y))[:, None, None]


class MaskedNet(nn.Module):
  @nn.compact
  def __call__(self, images, sizes):
    for features in (4, 6):
      images, sizes = MaskedConv(
        features, (3, 3), strides=2, padding=[(1, 1), (1, 1)]
      )(images, sizes)
      images = SqueezeAndExcite()(nn.relu(images))
    return nn.Dense(3, name="head")(images.mean((1, 2)))


class PonderStep(nn.Module):
  """Half of it is shared by all steps, half is each step's own."""

  @nn.compact
  def __call__(self, x, _):
    shared = nn.tanh(nn.Dense(4, name="ponder_step")(x))
    return x + nn.Dense(4, name="own")(shared), None


class Ponder(nn.Module):
  """PonderNet's steps: a scan in which `map_variables` lays what is shared in
  a collection of its own, and outside of it back among the parameters."""

  @nn.compact
  def __call__(self, x):
    def joined(tree: Any) -> Any:
      return {
        "params": {**tree.get("params", {}), **tree.get("shared_params", {})}
      }

    def apart(tree: Any) -> Any:
      own = dict(tree.get("params", {}))
      shared = {n: own.pop(n) for n in ("ponder_step",) if n in own}
      return {"params": own, "shared_params": shared}

    both = ["params", "shared_params"]
    step = nn.map_variables(PonderStep, both, joined, apart, mutable=True)
    steps = nn.scan(
      step,
      variable_broadcast="shared_params",
      variable_axes={"params": 0},
      split_rngs={"params": False},
      length=3,
    )
    steps = nn.map_variables(steps, both, apart, joined, mutable=True)
    return nn.Dense(3, name="head")(steps(name="steps")(x, None)[0])


ORIGIN = "google-research/scenic: "
MODELS = {
  "scenic's attention and residuals": Other(
    ORIGIN + "attention_layers, nn_layers",
    Encoder(),
    (normal(2, 5, 4),),
    axes=HEADS,
  ),
  "scenic's masked convolutions": Other(
    ORIGIN + "masked_layers, SqueezeAndExcite",
    MaskedNet(),
    (normal(2, 8, 8, 3), np.asarray([[8, 6], [4, 8]])),
  ),
  "scenic's PonderNet": Other(
    ORIGIN + "baselines/pondernet", Ponder(), (normal(2, 4),)
  ),
}
