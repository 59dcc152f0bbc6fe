"""EfficientNet-Lite: convolutions, without attention (arXiv 1905.11946).

A layer widens its channels, filters each of them by itself, and narrows them
again. The Lite networks have neither the squeeze-and-excitation nor the swish
of the others, for phones: github.com/tensorflow/tpu, efficientnet/lite.

BatchNorm is frozen: its running statistics are those of pretraining, in
training too, and no method trains or updates them, for else more than what is
said to be trained would change. Its scale and bias are leaves of the base that
methods may train. Layers differ in their shapes and can't be stacked.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.errors import UserError
from vera_jax.models.family import (
  IMAGES,
  Family,
  Names,
  field_table,
  one_of,
)
from vera_jax.models.other_networks.depthwise import depthwise
from vera_jax.models.part import with_remat
from vera_jax.models.vision import EXAMPLE, HEAD, Logits, Pixels, input_shapes

Hidden = Float[Array, "rows height width channels"]
Made = Float[Array, "rows tall wide made"]
KIND = "efficientnet_lite"
STEM_STRIDE = 2
# Sides of a filter, whose taps are computed one by one, and layers, at most.
LARGEST, DEEPEST = 31, 128


class Stage(NamedTuple):
  """Layers in a row that give images of the same shape.

  Attributes:
    layers: how many.
    kernel: the side of the filters, in pixels.
    stride: of the first layer.
    expand: how many times as wide the filtered images are as the read ones.
    width: channels that come out.
  """

  layers: int
  kernel: int
  stride: int
  expand: int
  width: int


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
  """The fields of a config.json that the model reads.

  Attributes:
    stem_width, last_width: channels of the first and the last convolution.
    image_size: pixels of a side in pretraining; others are possible.
  """

  stem_width: int
  stages: tuple[Stage, ...]
  last_width: int
  batch_norm_eps: float = 1e-3
  image_size: int = 224
  num_channels: int = 3
  model_type: str = KIND

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "EfficientNetConfig":
    """Picks the model's fields; what it can't honour is a UserError."""
    one_of(fields, "model_type", (KIND,))
    names = [field.name for field in dataclasses.fields(cls)]
    values = {name: fields[name] for name in names if name in fields}
    try:
      values["stages"] = tuple(Stage(**stage) for stage in fields["stages"])
      config = cls(**values)
      sizes = [config.stem_width, config.last_width, config.image_size]
      for number in (*sizes, *(n for stage in config.stages for n in stage)):
        if not isinstance(number, int) or number < 1:
          raise ValueError(f"{number!r} is no size")
      side = max((stage.kernel for stage in config.stages), default=0)
      if side > LARGEST:
        raise ValueError(f"a kernel of {side}; at most {LARGEST} are possible")
      if (layers := sum(stage.layers for stage in config.stages)) > DEEPEST:
        raise ValueError(f"{layers} layers; at most {DEEPEST} are possible")
      if not config.stages or not 0 < config.batch_norm_eps < 1:
        raise ValueError("there are no stages, or no batch_norm_eps")
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(
        f"config.json has no usable fields of {KIND}: {error}."
      ) from error
    return config

  @property
  def hidden_size(self) -> int:
    """What the head reads."""
    return self.last_width

  @property
  def mean_width(self) -> int:
    """Of what the layers give, for estimates of time."""
    total = sum(stage.layers * stage.width for stage in self.stages)
    return total // self.num_hidden_layers

  @property
  def num_hidden_layers(self) -> int:
    return sum(stage.layers for stage in self.stages)

  @property
  def num_attention_heads(self) -> int:
    """One, which no mesh splits: there is no attention."""
    return 1

  @property
  def patch_size(self) -> int:
    """Pixels of a side that one place of the last convolution stands for."""
    return STEM_STRIDE * math.prod(stage.stride for stage in self.stages)


class BatchNorm(nn.Module):
  """Batch normalisation (arXiv 1502.03167) by stored statistics, always.

  Attributes:
    epsilon: added to the variance.
    dtype, param_dtype: of what is returned, and of the parameters.
  """

  epsilon: float
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Hidden) -> Hidden:
    starts = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
    scale, bias, mean, var = (
      self.param(
        name, nn.initializers.constant(value), x.shape[-1:], self.param_dtype
      ).astype(jnp.float32)
      for name, value in starts.items()
    )
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    shift = bias - mean * factor
    factor, shift = (
      leaf.astype(self.dtype)[None, None, None] for leaf in (factor, shift)
    )
    return x * factor + shift


class Part(nn.Module):
  """A piece of the network: the settings that all share.

  Attributes:
    config: of the network.
    dtype, param_dtype: of computing, and of the parameters.
  """

  config: EfficientNetConfig
  dtype: DTypeLike
  param_dtype: DTypeLike

  @property
  def settings(self) -> tuple[EfficientNetConfig, DTypeLike, DTypeLike]:
    return self.config, self.dtype, self.param_dtype

  @nn.nowrap
  def filtered(
    self,
    x: Hidden,
    name: str,
    width: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    each: bool = False,
  ) -> Made:
    """A convolution and its BatchNorm; with `each`, every channel by itself."""
    convolution = nn.Conv(
      width,
      (kernel, kernel),
      strides=(stride, stride),
      padding="SAME",
      feature_group_count=width if each else 1,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      conv_general_dilated=depthwise if each else None,
      name=name,
    )
    norm = BatchNorm(
      self.config.batch_norm_eps,
      self.dtype,
      self.param_dtype,
      name=f"{name}_norm",
    )
    return norm(convolution(x))


class Layer(Part):
  """An inverted bottleneck.

  Attributes:
    stage: that the layer is in.
    first: whether it is the stage's first one.
  """

  stage: Stage
  first: bool

  @nn.compact
  def __call__(self, x: Hidden) -> Made:
    stage, read = self.stage, x.shape[-1]
    stride, wide = stage.stride if self.first else 1, read * stage.expand
    y = x
    if stage.expand > 1:
      y = nn.relu6(self.filtered(y, "expand", wide))
    y = self.filtered(
      y, "depthwise", wide, kernel=stage.kernel, stride=stride, each=True
    )
    y = self.filtered(nn.relu6(y), "project", stage.width)
    return x + y if stride == 1 and read == stage.width else y


class Encoder(Part):
  """All layers; `remat` as for `pretrained.blueprint`."""

  remat: str

  @nn.compact
  def __call__(self, x: Hidden) -> Made:
    layer = with_remat(Layer, self.remat)
    number = 0
    for stage in self.config.stages:
      for index in range(stage.layers):
        name = f"layer_{number}"
        x = layer(*self.settings, stage, index == 0, name=name)(x)
        number += 1
    return x


class EfficientNet(Part):
  """Layers and head: pixels to one row of outputs for each image.

  Attributes:
    outputs: of the head, which is trained and stays in float32.
    remat: as for `pretrained.blueprint`.
  """

  outputs: int
  remat: str = "none"

  @nn.compact
  def __call__(
    self, pixel_values: Pixels, *, deterministic: bool = True
  ) -> Logits:
    """Logits in float32; images may have any size. Nothing is random."""
    config = self.config
    x = jnp.asarray(pixel_values, self.dtype)
    x = self.filtered(
      x, "stem", config.stem_width, kernel=3, stride=STEM_STRIDE
    )
    encoder = Encoder(*self.settings, self.remat, name="encoder")
    x = encoder(nn.relu6(x))
    x = nn.relu6(self.filtered(x, "last", config.last_width))
    read = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    start = nn.initializers.normal(0.02)
    head = nn.Dense(self.outputs, kernel_init=start, name="classifier")
    return head(read)[:, None]


def module(
  config: EfficientNetConfig,
  head: str,
  outputs: int,
  *,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  scan: bool,
  remat: str,
) -> EfficientNet:
  """`Family.module`; there is no stack to scan."""
  return EfficientNet(config, dtype, param_dtype, outputs, remat)


FAMILY = {
  KIND: Family(
    config=EfficientNetConfig.from_dict,
    fields=field_table(
      "batch_norm_eps image_size last_width stages stem_width",
      fixed={"num_channels": (3, None)},
    ),
    module=module,
    inputs=input_shapes,
    names=Names(new=("classifier/",)),
    rules=(),
    room=lambda config: 1,
    classes={HEAD: "EfficientNetLiteForImageClassification"},
    fixed=r".*_norm/(mean|var)",
    stacks=False,
    own=True,
    reads=IMAGES,
    example=EXAMPLE,
  )
}
