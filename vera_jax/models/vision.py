"""What ViT and DINOv2 have in common: patches, positions, attention, layers.

An image is cut into square patches; each patch is a token, and one more token,
the class token, stands before them (arXiv 2010.11929). Layers normalise what
they read. Pixels are normalised already and have their channels last.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vera_jax.errors import UserError
from vera_jax.models import part
from vera_jax.models.family import (
  IMAGES,
  Family,
  Fields,
  Names,
  one_of,
  take_fields,
)
from vera_jax.models.part import apply_layers, with_remat
from vera_jax.operations.attention import ACTIVATIONS
from vera_jax.operations.norm import LayerNorm

Pixels = Float[Array, "rows height width channels"]
Hidden = Float[Array, "rows tokens hidden"]
Read = Float[Array, "rows reads hidden"]
Logits = Float[Array, "rows 1 labels"]
HEAD = "classification"
# The fields of config.json that both families read.
USED = (
  "attention_probs_dropout_prob head_dim hidden_act hidden_dropout_prob"
  " hidden_size image_size initializer_range layer_norm_eps"
  " num_attention_heads num_hidden_layers patch_size qkv_bias"
)
EXAMPLE = (1, 32, 1)  # images, pixels of a side, answers for each
CUBIC = -0.75  # the slope of the kernel that torch resizes bicubically with


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The fields of a Hugging Face config.json that the models read."""

  model_type: str
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  image_size: int
  patch_size: int
  layer_norm_eps: float
  num_channels: int = 3
  qkv_bias: bool = True
  hidden_act: str = "gelu"
  initializer_range: float = 0.02
  hidden_dropout_prob: float = 0.0
  attention_probs_dropout_prob: float = 0.0
  layerscale_value: float = 1.0

  @classmethod
  def checked(cls, fields: Mapping[str, Any]) -> "VisionConfig":
    """Picks the models' fields; what they can't honour is a UserError."""
    one_of({"hidden_act": "gelu", **fields}, "hidden_act", ACTIVATIONS)
    config = take_fields(cls, fields)
    if not 0 < config.patch_size <= config.image_size:
      raise UserError(
        f"config.json: patches of {config.patch_size} pixels don't fit images"
        f" of {config.image_size}."
      )
    return config

  @property
  def side(self) -> int:
    """Patches along each side of an image, as the position table has them."""
    return self.image_size // self.patch_size


def input_shapes(rows: int, length: int, slots: int) -> dict[str, Any]:
  """The input's shape for square images of `length` pixels per side."""
  shape = (rows, length, length, 3)
  return {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.float32)}


def cubic_weights(new: int, old: int) -> Float[np.ndarray, "new old"]:
  """The matrix that resizes `old` values to `new` as torch does bicubically.

  Its convolution has four taps, also where values get fewer, and repeats the
  value at each end (`interpolate(mode="bicubic", align_corners=False)`).
  """
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(centre)
  taps = np.arange(-1, 3)
  away = np.abs((centre - first)[:, None] - taps)
  near = ((CUBIC + 2) * away - (CUBIC + 3)) * away**2 + 1
  far = ((away - 5) * away + 8) * away * CUBIC - 4 * CUBIC
  columns = np.clip(first[:, None] + taps, 0, old - 1).astype(int)
  weights = np.zeros((new, old))
  rows = np.broadcast_to(np.arange(new)[:, None], columns.shape)
  np.add.at(weights, (rows, columns), np.where(away <= 1, near, far))
  return weights.astype(np.float32)


def norm(part: Any, name: str) -> LayerNorm:
  """A LayerNorm with the settings of a `Part`, or of the whole network."""
  epsilon = part.config.layer_norm_eps
  return LayerNorm(epsilon, part.dtype, part.param_dtype, name=name)


class Part(part.Part):
  """A piece of a network that reads images."""

  @nn.nowrap
  def hidden_dropout(self, hidden: Array) -> Array:
    return self.dropout(hidden, self.config.hidden_dropout_prob)


class Patches(Part):
  """Each patch as a token: a convolution whose steps are as wide as itself."""

  @nn.compact
  def __call__(self, pixels: Pixels) -> Float[Array, "rows tall wide hidden"]:
    size = (self.config.patch_size,) * 2
    return nn.Conv(
      self.config.hidden_size,
      size,
      strides=size,
      padding="VALID",
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.normal(self.config.initializer_range),
      name="projection",
    )(pixels)


class Embeddings(Part):
  """The class token and the patches, with their positions added.

  The position table is resized where an image has another number of patches.
  """

  @nn.compact
  def __call__(self, pixels: Pixels) -> Hidden:
    config, start = self.config, nn.initializers.normal
    patches = Patches(*self.settings, name="patch_embeddings")(pixels)
    width, grid = config.hidden_size, patches.shape[1:3]
    first = self.param(
      "cls_token",
      start(config.initializer_range),
      (1, 1, width),
      self.param_dtype,
    )
    table = self.param(
      "position_embeddings",
      start(config.initializer_range),
      (1, 1 + config.side**2, width),
      self.param_dtype,
    )
    places = table[0, 1:].reshape(config.side, config.side, width)
    if grid != places.shape[:2]:
      tall, wide = (jnp.asarray(cubic_weights(n, config.side)) for n in grid)
      places = jnp.einsum(
        "ha,wb,abk->hwk", tall, wide, places.astype(jnp.float32)
      )
    patches = patches + jnp.asarray(places, self.dtype)[None]
    patches = patches.reshape(len(pixels), -1, width)
    first = jnp.asarray(first + table[:, :1], self.dtype)
    first = jnp.broadcast_to(first, (len(pixels), 1, width))
    return self.hidden_dropout(jnp.concatenate([first, patches], axis=1))


class SelfAttention(Part):
  @nn.compact
  def __call__(self, read: Read, hidden: Hidden) -> Read:
    return self.attention(read, hidden, None, bias=self.config.qkv_bias)


class Projection(Part):
  """One dense layer in a module of its own, as the files have it."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return self.dense(self.features, "dense", bias=True)(x)


class Attention(Part):
  @nn.compact
  def __call__(self, read: Read, hidden: Hidden) -> Read:
    context = SelfAttention(*self.settings, name="attention")(read, hidden)
    width = self.config.hidden_size
    return Projection(*self.settings, width, name="output")(context)


def _everywhere(
  layer: nn.Module, hidden: Hidden, extra: None
) -> tuple[Hidden, None]:
  """A layer at every token, as `apply_layers` calls it."""
  return layer(hidden), None


class Encoder(Part):
  """All layers; the last one for the first `reads` tokens alone, or for all.

  Past its keys and values the last layer mixes no tokens, so nothing of it need
  be computed where the head does not read.

  Attributes:
    kind: the family's layer, (hidden, reads=None) -> hidden.
    reads: how many tokens the head reads; None for all.
    scan, remat: as for `pretrained.blueprint`.
  """

  kind: Any
  reads: int | None
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, hidden: Hidden) -> Read:
    inner = self.config.num_hidden_layers - 1
    layer = with_remat(self.kind, self.remat, scan=self.scan)
    hidden, _ = apply_layers(self, layer, _everywhere, hidden, [None] * inner)
    return layer(*self.settings, self.reads, name=f"layer_{inner}")(hidden)


class ImageClassifier(nn.Module):
  """Encoder and head: pixels to one row of outputs for each image.

  Attributes:
    config, outputs: of the network, and of its head.
    layer: the family's, as for `Encoder`.
    reads: how many tokens the head reads, from the first; None for all.
    pool: these tokens, normalised -> what the head's dense layer reads.
    dtype, param_dtype: of computing and of the encoder's parameters; the head,
      which is trained, stays in float32.
    scan, remat: as for `pretrained.blueprint`.
  """

  config: VisionConfig
  outputs: int
  layer: Any
  reads: int | None
  pool: Callable[[Array], Array]
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  scan: bool = True
  remat: str = "none"

  @nn.compact
  def __call__(
    self, pixel_values: Pixels, *, deterministic: bool = True
  ) -> Logits:
    """Logits in float32; images may have any size of a patch or more."""
    settings = (self.config, self.dtype, self.param_dtype, deterministic)
    pixels = jnp.asarray(pixel_values, self.dtype)
    hidden = Embeddings(*settings, name="embeddings")(pixels)
    encoder = Encoder(
      *settings, self.layer, self.reads, self.scan, self.remat, name="encoder"
    )
    read = norm(self, "layernorm")(encoder(hidden))
    start = nn.initializers.normal(self.config.initializer_range)
    head = nn.Dense(self.outputs, kernel_init=start, name="classifier")
    return head(self.pool(read).astype(jnp.float32))[:, None]


def family(
  *,
  layer: type[Part],
  reads: int | None,
  pool: Callable[[Array], Array],
  config: Callable[[Mapping[str, Any]], VisionConfig],
  fields: Fields,
  name: str,
  renamed: tuple[tuple[str, str], ...],
  wide: str,
  narrow: str,
) -> Family:
  """A family of image classifiers.

  Args:
    layer, reads, pool: as for `ImageClassifier`.
    config: config.json's fields -> the dataclass.
    fields: what is done with each of them.
    name: in transformers' classes; in lower case it is the files' prefix.
    renamed: transformers' names of modules since 5.24, and those of the files.
    wide, narrow: patterns of the dense layers of a feed-forward, by what they
      give, for their sharding.
  """

  def module(config: VisionConfig, head: str, outputs: int, **options: Any):
    return ImageClassifier(config, outputs, layer, reads, pool, **options)

  def to_class(name: str) -> str:
    for newer, in_file in renamed:
      name = name.replace(in_file, newer)
    return name

  inward = rf"encoder/.*(query|key|value|{wide})"
  return Family(
    config=config,
    fields=fields,
    module=module,
    inputs=input_shapes,
    names=Names(
      prefixes=(f"{name.lower()}.",),
      renamed=renamed,
      unused=("pooler.", "embeddings.mask_token"),
      new=("classifier/",),
      to_class=to_class,
    ),
    rules=(
      (rf"{inward}/kernel", ("fsdp", "tensor")),
      (rf"{inward}/bias", ("tensor",)),
      (rf"encoder/.*({narrow})/kernel", ("tensor", "fsdp")),
    ),
    room=lambda config: 1 + config.side**2,
    classes={HEAD: f"{name}ForImageClassification"},
    reads=IMAGES,
    example=EXAMPLE,
  )
