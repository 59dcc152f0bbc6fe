"""ViT (arXiv 2010.11929), with a classifier on the class token.

Names are those of the files on the hub. Since 5.24 transformers' classes name
the modules otherwise; files with those names are read too.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax import Array

from vera_jax.models.family import field_table, one_of
from vera_jax.models.vision import (
  USED,
  Attention,
  Hidden,
  Part,
  Projection,
  Read,
  VisionConfig,
  family,
  norm,
)
from vera_jax.operations.attention import ACTIVATIONS

# transformers' names of modules since 5.24, and those of the files.
RENAMED = (
  ("layers.", "encoder.layer."),
  ("attention.q_proj", "attention.attention.query"),
  ("attention.k_proj", "attention.attention.key"),
  ("attention.v_proj", "attention.attention.value"),
  ("attention.o_proj", "attention.output.dense"),
  ("mlp.fc1", "intermediate.dense"),
  ("mlp.fc2", "output.dense"),
)
FIELDS = field_table(
  f"{USED} intermediate_size",
  # of pretraining, and of a pooler that the classifier has not
  unused="encoder_stride pooler_act pooler_output_size",
  fixed={"num_channels": (3, None)},
)


def read_config(fields: Mapping[str, Any]) -> VisionConfig:
  """config.json; what can't be honoured is a UserError."""
  one_of(fields, "model_type", ("vit",))
  defaults = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12}
  return VisionConfig.checked({**defaults, **fields})


class Layer(Part):
  """Applies one layer, and keeps the first `reads` tokens, or all."""

  reads: int | None = None

  @nn.compact
  def __call__(self, hidden: Hidden) -> Read:
    config, reads = self.config, self.reads

    def projection(features: int, name: str) -> Projection:
      return Projection(*self.settings, features, name=name)

    normed = norm(self, "layernorm_before")(hidden)
    attention = Attention(*self.settings, name="attention")
    context = attention(normed[:, :reads], normed)
    hidden = hidden[:, :reads] + self.hidden_dropout(context)
    normed = norm(self, "layernorm_after")(hidden)
    inner = projection(config.intermediate_size, "intermediate")(normed)
    inner = ACTIVATIONS[config.hidden_act](inner)
    inner = projection(config.hidden_size, "output")(inner)
    return hidden + self.hidden_dropout(inner)


def class_token(read: Array) -> Array:
  return read[:, 0]


FAMILY = {
  "vit": family(
    layer=Layer,
    reads=1,
    pool=class_token,
    config=read_config,
    fields=FIELDS,
    name="ViT",
    renamed=RENAMED,
    wide="intermediate/dense",
    narrow="output/dense",
  )
}
