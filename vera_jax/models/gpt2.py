"""GPT-2: learned positions, a fused kernel of query, key and value, tied words.

(Radford et al., 2019.) Layers normalise what they read. The files have their
kernels as (in, out), as here. Targets may name `c_attn`, the whole kernel, as
PEFT does, or its parts `query`, `key` and `value`, as the paper does.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vera_jax.models.decoder import (
  HEAD,
  Hidden,
  Pair,
  Pieces,
  Reach,
  Table,
  attend_cached,
  input_shapes,
  module,
  table_of,
  write,
)
from vera_jax.models.family import (
  CAUSAL,
  Family,
  Names,
  field_table,
  one_of,
  renamed,
  take_fields,
)
from vera_jax.models.part import Part
from vera_jax.operations.attention import ACTIVATIONS, Ids
from vera_jax.operations.norm import LayerNorm

# config.json's names of what every family's config has.
WORDS = {
  "n_embd": "hidden_size",
  "n_layer": "num_hidden_layers",
  "n_head": "num_attention_heads",
  "n_positions": "max_position_embeddings",
  "n_inner": "intermediate_size",
}
FIELDS = field_table(
  "activation_function attn_pdrop embd_pdrop hidden_size initializer_range"
  " layer_norm_epsilon max_position_embeddings n_embd n_head n_inner n_layer"
  " n_positions num_attention_heads num_hidden_layers resid_pdrop"
  " scale_attn_by_inverse_layer_idx scale_attn_weights tie_word_embeddings"
  " vocab_size",
  # scores are in float32 always, as reorder_and_upcast_attn would have them;
  # the summary is of a head for choices
  unused="is_decoder n_ctx reorder_and_upcast_attn summary_activation"
  " summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
  fixed={**CAUSAL, "sliding_window": (None,)},
)


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
  """The fields of a Hugging Face config.json that the model reads."""

  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  intermediate_size: int
  activation_function: str = "gelu_new"
  layer_norm_epsilon: float = 1e-5
  initializer_range: float = 0.02
  embd_pdrop: float = 0.1
  attn_pdrop: float = 0.1
  resid_pdrop: float = 0.1
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  tie_word_embeddings: bool = True
  sliding_window: None = None

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def num_key_value_heads(self) -> int:
    return self.num_attention_heads

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Gpt2Config":
    """Picks the model's fields; what it can't honour is a UserError."""
    known = {"activation_function": "gelu_new", **renamed(fields, WORDS)}
    one_of(known, "model_type", ("gpt2",))
    one_of(known, "activation_function", ACTIVATIONS)
    if known.get("intermediate_size") is None:
      known["intermediate_size"] = 4 * int(known.get("hidden_size") or 0)
    return take_fields(cls, known)


def norm(part: Part, name: str) -> LayerNorm:
  """LayerNorm with the config's epsilon."""
  epsilon = part.config.layer_norm_epsilon
  return LayerNorm(epsilon, part.dtype, part.param_dtype, name=name)


class Embeddings(Part):
  @nn.compact
  def __call__(self, input_ids: Ids, positions: Ids) -> tuple[Hidden, Table]:
    config = self.config
    words = self.embed(config.vocab_size, "wte")
    places = self.embed(config.max_position_embeddings, "wpe")
    hidden = words(input_ids) + places(positions)
    table = table_of(words, self.dtype)
    return self.dropout(hidden, config.embd_pdrop), table


class Attention(Part):
  @nn.compact
  def __call__(
    self, hidden: Hidden, index: Any, past: Pair | None, reach: Reach
  ) -> tuple[Hidden, Pair | None]:
    config, width = self.config, self.config.hidden_size
    fused = self.dense(3 * width, "c_attn", bias=True)(hidden)
    query, key, value = (
      x.reshape(*x.shape[:-1], config.num_attention_heads, config.head_dim)
      for x in jnp.split(fused, 3, axis=-1)
    )
    scale: Any = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
      scale = scale / (index + 1)
    if past is not None:
      past = write(past, key, value, reach)
    context = attend_cached(
      query,
      key,
      value,
      reach.whole,
      past=past,
      scale=scale,
      dropout=lambda x: self.dropout(x, config.attn_pdrop),
    )
    out = self.dense(width, "c_proj", bias=True)(context)
    return self.dropout(out, config.resid_pdrop), past


class FeedForward(Part):
  @nn.compact
  def __call__(self, hidden: Hidden) -> Hidden:
    config = self.config
    inner = self.dense(config.intermediate_size, "c_fc", bias=True)(hidden)
    inner = ACTIVATIONS[config.activation_function](inner)
    out = self.dense(config.hidden_size, "c_proj", bias=True)(inner)
    return self.dropout(out, config.resid_pdrop)


class Layer(Part):
  @nn.compact
  def __call__(
    self, hidden: Hidden, index: Any, past: Pair | None, reach: Reach
  ) -> tuple[Hidden, Pair | None]:
    attention = Attention(*self.settings, name="attn")
    context, past = attention(norm(self, "ln_1")(hidden), index, past, reach)
    hidden = hidden + context
    feed_forward = FeedForward(*self.settings, name="mlp")
    hidden = hidden + feed_forward(norm(self, "ln_2")(hidden))
    return hidden, past


PIECES = Pieces(Embeddings, Layer, norm, shared=lambda config, reach: reach)


def fused(config: Gpt2Config) -> dict[str, dict[str, tuple[int, int]]]:
  """The first and last column of each part of the fused kernels."""
  width = config.hidden_size
  return {
    "c_attn": {
      name: (i * width, (i + 1) * width)
      for i, name in enumerate(("query", "key", "value"))
    }
  }


def _to_file(name: str) -> str:
  name = re.sub(r"^encoder\.layer\b", "h", name)
  return re.sub(r"^encoder\.norm\b", "ln_f", name).removeprefix("embeddings.")


def _to_tree(name: str) -> str:
  # masks that older files have among the weights
  name = re.sub(r"^(h\.\d+\.attn\.(masked_)?bias)$", r"buffers.\1", name)
  name = re.sub(r"^(w[tp]e)\b", r"embeddings.\1", name)
  name = re.sub(r"^h\b", "encoder.layer", name)
  return re.sub(r"^ln_f\b", "encoder.norm", name)


FAMILY = {
  "gpt2": Family(
    config=Gpt2Config.from_dict,
    fields=FIELDS,
    module=partial(module, PIECES),
    inputs=input_shapes,
    names=Names(
      prefixes=("transformer.",),
      outside=("lm_head",),
      unused=("buffers.",),
      tied=("lm_head.weight", "embeddings.wte.weight"),
      to_file=_to_file,
      to_tree=_to_tree,
      transposed=False,
    ),
    # A fused kernel is not split over `tensor`: the cuts would not be those of
    # query, key and value.
    rules=(
      (r"encoder/.*c_attn/kernel", ("fsdp", None)),
      (r"encoder/.*c_fc/kernel", ("fsdp", "tensor")),
      (r"encoder/.*c_fc/bias", ("tensor",)),
      (r"encoder/.*c_proj/kernel", ("tensor", "fsdp")),
      (r"embeddings/.*/embedding", (None, "fsdp")),
    ),
    room=lambda config: config.max_position_embeddings,
    classes={HEAD: "GPT2LMHeadModel"},
    fused=fused,
  )
}
