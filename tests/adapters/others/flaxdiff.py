"""FlaxDiff's UNet: residual blocks with standardised, separable, transposed
and plain convolutions, and attention to a text."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.adapters.others.other import HEADS, Other, normal


class WeightStandardizedConv(nn.Module):
  """Its own parameters, standardised, are given to a convolution of flax's
  that is bound to nothing."""

  features: int
  kernel_size: tuple[int, int]

  @nn.compact
  def __call__(self, x):
    conv = nn.Conv(self.features, self.kernel_size, parent=None)

    def first(key, name):
      return conv.init(key, x)["params"][name]

    kernel = self.param("kernel", first, "kernel")
    bias = self.param("bias", first, "bias")
    mean = kernel.mean((0, 1, 2), keepdims=True)
    var = kernel.var((0, 1, 2), keepdims=True)
    kernel = (kernel - mean) / jnp.sqrt(var + 1e-3)
    return conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)


class SeparableConv(nn.Module):
  features: int
  kernel_size: tuple[int, int]

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(
      x.shape[-1],
      self.kernel_size,
      feature_group_count=x.shape[-1],
      use_bias=False,
    )(x)
    return nn.Conv(self.features, (1, 1), use_bias=False)(x)


CONVOLUTIONS = {
  "conv": nn.Conv,
  "w_conv": WeightStandardizedConv,
  "separable": SeparableConv,
  "conv_transpose": nn.ConvTranspose,
}


class ConvLayer(nn.Module):
  kind: str
  features: int

  def setup(self):
    self.conv = CONVOLUTIONS[self.kind](self.features, (3, 3))

  def __call__(self, x):
    return self.conv(x)


class ResidualBlock(nn.Module):
  kind: str
  features: int

  @nn.compact
  def __call__(self, x, time):
    y = nn.swish(nn.GroupNorm(2)(x))
    y = ConvLayer(self.kind, self.features, name="conv1")(y)
    shift = nn.DenseGeneral(self.features, name="temb_projection")(time)
    y = nn.swish(nn.GroupNorm(2)(y + shift[:, None, None]))
    y = ConvLayer(self.kind, self.features, name="conv2")(y)
    if x.shape != y.shape:
      x = ConvLayer(self.kind, self.features, name="residual_conv")(x)
    return x + y


class Attention(nn.Module):
  """Patches ask, words answer. The heads' features are a list."""

  def setup(self):
    dense = partial(nn.DenseGeneral, features=[2, 3], axis=-1, use_bias=False)
    self.query = dense(name="to_q")
    self.key = dense(name="to_k")
    self.value = dense(name="to_v")
    self.proj_attn = nn.DenseGeneral(4, axis=(-2, -1), name="to_out_0")
    self.norm = nn.RMSNorm()

  def __call__(self, x, words):
    patches = self.norm(x).reshape(len(x), -1, x.shape[-1])
    q, k, v = self.query(patches), self.key(words), self.value(words)
    y = self.proj_attn(nn.dot_product_attention(q, k, v))
    return x + y.reshape(x.shape)


class FourierEmbedding(nn.Module):
  """Frequencies that are no parameters."""

  features: int

  def setup(self):
    key = jax.random.key(42)
    self.freqs = jax.random.normal(key, (self.features // 2,))

  def __call__(self, time):
    angles = 2 * np.pi * time[:, None] * self.freqs[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimeProjection(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.DenseGeneral(self.features)(x))
    return nn.gelu(nn.DenseGeneral(self.features)(x))


class Unet(nn.Module):
  @nn.compact
  def __call__(self, images, time, words):
    time = TimeProjection(6)(FourierEmbedding(6)(time))
    x = first = ConvLayer("conv", 4)(images)
    x = ResidualBlock("w_conv", 4, name="down_0")(x, time)
    x = Attention(name="down_0_attention")(x, words)
    x = nn.Conv(6, (3, 3), strides=(2, 2), name="down_0_downsample")(x)
    x = ResidualBlock("separable", 6, name="middle")(x, time)
    x = jax.image.resize(x, (*first.shape[:3], 6), "nearest")
    x = ConvLayer("conv_transpose", 4, name="up_0_upsample")(x)
    x = jnp.concatenate([x, first], axis=-1)
    x = ResidualBlock("w_conv", 4, name="up_0")(x, time)
    return ConvLayer("conv", 3)(nn.swish(nn.GroupNorm(2)(x)))


MODELS = {
  "FlaxDiff's UNet": Other(
    "AshishKumar4/FlaxDiff: models/simple_unet, common, attention",
    Unet(),
    (normal(2, 6, 6, 3), normal(2), normal(2, 3, 5)),
    axes=HEADS,
  )
}
