"""Residual networks with standardised convolutions, as vision_transformer,
octo, big_vision and scenic define them: a class that overrides `param` and
inherits `__call__`."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from tests.adapters.others.other import HEADS, Other, normal


class StdConv(nn.Conv):
  """The kernel's mean is taken off and its deviation divided by; `eps` is
  added to the deviation."""

  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    if name == "kernel":
      value = value - value.mean((0, 1, 2), keepdims=True)
      value = value / (value.std((0, 1, 2), keepdims=True) + 1e-5)
    return value


class Bottleneck(nn.Module):
  """A unit after whose products norms come: vision_transformer's, octo's."""

  features: int
  strides: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, x):
    wide, old = 4 * self.features, x
    if x.shape[-1] != wide or self.strides != (1, 1):
      old = StdConv(
        wide, (1, 1), self.strides, use_bias=False, name="conv_proj"
      )(x)
      old = nn.GroupNorm(2, name="gn_proj")(old)
    for i, (width, window, strides) in enumerate(
      [
        (self.features, (1, 1), (1, 1)),
        (self.features, (3, 3), self.strides),
        (wide, (1, 1), (1, 1)),
      ],
      1,
    ):
      x = StdConv(width, window, strides, use_bias=False, name=f"conv{i}")(x)
      x = nn.GroupNorm(2, name=f"gn{i}")(x)
      x = nn.relu(x) if i < 3 else x
    return nn.relu(old + x)


class BiT(nn.Module):
  """The head is called twice: on the map and on its mean."""

  @nn.compact
  def __call__(self, images):
    x = StdConv(
      4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="root"
    )(images)
    x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
    x = Bottleneck(2, name="unit1")(x)
    x = Bottleneck(4, (2, 2), name="unit2")(x)
    head = nn.Dense(3, name="head")
    return head(x), head(x.mean((1, 2)))


class EncoderBlock(nn.Module):
  """Of vision_transformer and scenic: flax's attention, and an MLP."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(y, y)
    y = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(y)


class Identity(nn.Module):
  """Gives an array a name."""

  @nn.compact
  def __call__(self, x):
    return x


class HybridViT(nn.Module):
  """A standardised root and stage, patches, a class token, an encoder."""

  @nn.compact
  def __call__(self, images):
    x = StdConv(4, (7, 7), (2, 2), use_bias=False, name="conv_root")(images)
    x = nn.relu(nn.GroupNorm(2, name="gn_root")(x))
    x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
    x = Bottleneck(2, name="unit1")(x)
    x = nn.Conv(4, (2, 2), (2, 2), padding="VALID", name="embedding")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    first = self.param("cls", nn.initializers.zeros, (1, 1, 4))
    x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
    place = nn.initializers.normal(0.02)
    x = x + self.param("pos_embedding", place, (1, *x.shape[1:]))
    x = nn.LayerNorm()(EncoderBlock(name="encoderblock_0")(x))
    return nn.Dense(3, name="head")(Identity(name="pre_logits")(x[:, 0]))


class FilmConditioning(nn.Module):
  @nn.compact
  def __call__(self, x, words):
    dense = partial(nn.Dense, x.shape[-1], kernel_init=nn.initializers.zeros)
    add = dense()(words)[:, None, None]
    scale = dense()(words)[:, None, None]
    return x * (1 + add) + scale


class SmallStem(nn.Module):
  """octo's: two standardised convolutions with biases, then patches, which an
  instruction scales and shifts."""

  @nn.compact
  def __call__(self, images, words):
    x = images
    for features in (4, 6):
      x = StdConv(features, (3, 3), (2, 2), padding=1)(x)
      x = nn.relu(nn.GroupNorm(2)(x))
    x = nn.Conv(5, (2, 2), (2, 2), padding="VALID", name="embedding")(x)
    return FilmConditioning()(x, words)


IMAGES = normal(2, 16, 16, 3)
MODELS = {
  "octo's small stem, with FiLM": Other(
    "octo-models/octo: SmallStem, FilmConditioning",
    SmallStem(),
    (IMAGES, normal(2, 7)),
  ),
  "vision_transformer's hybrid": Other(
    "google-research/vision_transformer: StdConv, ResidualUnit,"
    " VisionTransformer",
    HybridViT(),
    (IMAGES,),
    axes=HEADS,
  ),
  "scenic's and big_vision's ResNet": Other(
    "google-research/scenic: bit_resnet; google-research/big_vision:"
    " models/bit",
    BiT(),
    (IMAGES,),
  ),
}
