"""DINOv2 (arXiv 2304.07193): a ViT that scales what its layers add.

The classifier reads the class token and the mean of the patches. Names are
those of the files on the hub; the ones that transformers' classes have since
5.24 are read too.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from vera_jax.models.family import field_table, one_of
from vera_jax.models.vision import (
  USED,
  Attention,
  Hidden,
  Part,
  Read,
  VisionConfig,
  family,
  norm,
)
from vera_jax.operations.attention import ACTIVATIONS

# transformers' names of modules since 5.24, and those of the files.
RENAMED = (
  ("attention.q_proj", "attention.attention.query"),
  ("attention.k_proj", "attention.attention.key"),
  ("attention.v_proj", "attention.attention.value"),
  ("attention.o_proj", "attention.output.dense"),
)
FIELDS = field_table(
  f"{USED} layerscale_value mlp_ratio",
  # of feature maps, and of pretraining
  unused="_out_features _out_indices apply_layernorm out_features out_indices"
  " reshape_hidden_states stage_names use_mask_token",
  fixed={
    "drop_path_rate": (0.0, None),
    "num_channels": (3, None),
    "use_swiglu_ffn": (False, None),
  },
)


def read_config(fields: Mapping[str, Any]) -> VisionConfig:
  """config.json; what can't be honoured is a UserError."""
  one_of(fields, "model_type", ("dinov2",))
  fields = {"image_size": 224, "patch_size": 14, **fields}
  if isinstance(fields.get("hidden_size"), int):
    inner = int(fields["hidden_size"] * fields.get("mlp_ratio", 4))
    fields["intermediate_size"] = inner
  return VisionConfig.checked({"layer_norm_eps": 1e-6, **fields})


class Scale(Part):
  """LayerScale: a factor for each feature of what a layer adds."""

  @nn.compact
  def __call__(self, hidden: Hidden) -> Hidden:
    start = nn.initializers.constant(self.config.layerscale_value)
    width = self.config.hidden_size
    factors = self.param("lambda1", start, (width,), self.param_dtype)
    return hidden * jnp.asarray(factors, self.dtype)[None, None]


class FeedForward(Part):
  @nn.compact
  def __call__(self, hidden: Hidden) -> Hidden:
    config = self.config
    inner = self.dense(config.intermediate_size, "fc1", bias=True)(hidden)
    inner = ACTIVATIONS[config.hidden_act](inner)
    return self.dense(config.hidden_size, "fc2", bias=True)(inner)


class Layer(Part):
  """Applies one layer, and keeps the first `reads` tokens, or all."""

  reads: int | None = None

  @nn.compact
  def __call__(self, hidden: Hidden) -> Read:
    reads = self.reads
    normed = norm(self, "norm1")(hidden)
    attention = Attention(*self.settings, name="attention")
    context = attention(normed[:, :reads], normed)
    scale = Scale(*self.settings, name="layer_scale1")
    hidden = hidden[:, :reads] + scale(context)
    normed = norm(self, "norm2")(hidden)
    inner = FeedForward(*self.settings, name="mlp")(normed)
    return hidden + Scale(*self.settings, name="layer_scale2")(inner)


def class_and_patches(read: Array) -> Array:
  """The class token beside the mean of the patches."""
  return jnp.concatenate([read[:, 0], read[:, 1:].mean(1)], axis=-1)


FAMILY = {
  "dinov2": family(
    layer=Layer,
    reads=None,
    pool=class_and_patches,
    config=read_config,
    fields=FIELDS,
    name="Dinov2",
    renamed=RENAMED,
    wide="fc1",
    narrow="output/dense|fc2",
  )._replace(processor="Bit")
}
