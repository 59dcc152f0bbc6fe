"""Gemma 3, and the text part of its larger checkpoints (arXiv 2503.19786).

A Llama in which most layers see a sliding window alone and rotate by a base of
their own. Attention and feed-forward layer have a norm behind them as well, all
norms multiply by 1 + their weight, and words come in scaled by the root of
their width. Checkpoints that read images too are read as their text part
(`family.TEXT_PARTS`).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vera_jax.errors import UserError
from vera_jax.models import llama
from vera_jax.models.decoder import (
  HEAD,
  Hidden,
  Pair,
  Pieces,
  Reach,
  Table,
  input_shapes,
  module,
  table_of,
)
from vera_jax.models.family import (
  CAUSAL,
  FULL,
  SLIDING,
  Family,
  Names,
  field_table,
  one_of,
  positive,
  take_fields,
)
from vera_jax.models.part import Part
from vera_jax.operations.attention import ACTIVATIONS, Ids

# Of each kind of layers, where older files have the base of its rotations, and
# the base where they have none.
THETA = {
  FULL: ("rope_theta", 1_000_000.0),
  SLIDING: ("rope_local_base_freq", 10_000.0),
}
FIELDS = field_table(
  "attention_bias attention_dropout head_dim hidden_activation hidden_size"
  " initializer_range intermediate_size layer_types max_position_embeddings"
  " num_attention_heads num_hidden_layers num_key_value_heads"
  " query_pre_attn_scalar rms_norm_eps rope_local_base_freq rope_parameters"
  " rope_scaling rope_theta sliding_window sliding_window_pattern"
  " tie_word_embeddings vocab_size",
  # where `layer_types` came from; how other programs keep keys and values
  unused="_sliding_window_pattern cache_implementation",
  fixed={
    **CAUSAL,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    llama.ORIGINAL: (None,),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
  },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(llama.LlamaConfig):
  """A Llama's fields, with Gemma's values where a config.json lacks them.

  Attributes:
    frequencies, rotation_scale: as a Llama's, of the layers that see all.
    local_frequencies, local_scale: of those with the sliding window.
    hidden_act: config.json's hidden_activation.
    query_pre_attn_scalar: scores are divided by its root.
  """

  local_frequencies: tuple = ()
  local_scale: float = 1.0
  vocab_size: int = 262_208
  hidden_size: int = 2304
  num_hidden_layers: int = 26
  num_attention_heads: int = 8
  num_key_value_heads: int = 4
  head_dim: int = 256
  intermediate_size: int = 9216
  max_position_embeddings: int = 131_072
  query_pre_attn_scalar: float = 256
  sliding_window: int | None = 4096
  tie_word_embeddings: bool = True
  hidden_act: str = "gelu_pytorch_tanh"

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Gemma3Config":
    """Picks the model's fields; what it can't honour is a UserError."""
    known = {
      "hidden_activation": cls.hidden_act,
      "query_pre_attn_scalar": cls.query_pre_attn_scalar,
      "sliding_window": cls.sliding_window,
      "sliding_window_pattern": 6,  # the last of so many layers sees all
      "attention_bias": False,
      **fields,
    }
    one_of(known, "model_type", ("gemma3_text",))
    bias = one_of(known, "attention_bias", (True, False))
    act = one_of(known, "hidden_activation", ACTIVATIONS)
    positive(known, "query_pre_attn_scalar")
    derived = {"frequencies": (), "rotation_scale": 1.0, "slides": ()} | {
      **{"qkv_bias": bias, "out_bias": bias, "head_norms": True},
      "hidden_act": act,
    }
    config = take_fields(cls, {**known, **derived})
    llama.check_heads(config)
    if known.get("layer_types") is None:
      every = int(positive(known, "sliding_window_pattern"))
      known["layer_types"] = [
        SLIDING if (i + 1) % every else FULL
        for i in range(config.num_hidden_layers)
      ]
    (far, far_scale), (near, near_scale) = (
      llama.rotations(rotation_fields(known, kind), config) for kind in THETA
    )
    return dataclasses.replace(
      config,
      slides=llama.slides_of(known, config),
      frequencies=far,
      rotation_scale=far_scale,
      local_frequencies=near,
      local_scale=near_scale,
    )

  @property
  def score_scale(self) -> float:
    return self.query_pre_attn_scalar**-0.5


def rotation_fields(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """The rotations of one kind of layers, in the fields that a Llama has.

  Newer files have `rope_parameters` by kind. In older ones `rope_scaling` is
  that of the layers that see all.
  """
  by_kind = fields.get("rope_parameters") or {}
  if wrong := sorted(by_kind.keys() - THETA.keys()):
    raise UserError(
      f"config.json: rope_parameters has {', '.join(wrong)}; this model has"
      f" them by kind of layer, for {' and '.join(THETA)}."
    )
  rope = dict(by_kind.get(kind) or {})
  if kind == FULL:
    rope |= fields.get("rope_scaling") or {}
  name, standard = THETA[kind]
  if rope.get("rope_theta") is None:
    theta = fields.get(name)
    older = {name: standard if theta is None else theta}
    rope["rope_theta"] = positive(older, name)
  return {"rope_parameters": rope}


class Norm(nn.Module):
  """RMSNorm that multiplies by 1 + its weight, in float32 and before rounding.

  In a weight's own sixteen bits, 1 + it would lose most of what it says.
  """

  epsilon: float
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    start = nn.initializers.zeros
    weight = self.param("scale", start, x.shape[-1:], self.param_dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, weight = x.astype(wide), jnp.asarray(weight, wide)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(power + self.epsilon)
    return (x * (1 + jnp.expand_dims(weight, range(x.ndim - 1)))).astype(
      self.dtype
    )


def norm(part: Part, name: str) -> nn.Module:
  """A norm, of which the backward pass keeps the input alone."""
  return nn.remat(Norm)(
    epsilon=part.config.rms_norm_eps,
    dtype=part.dtype,
    param_dtype=part.param_dtype,
    name=name,
  )


class Shared(NamedTuple):
  """What all layers are given: masks, and the cosines and sines of the
  rotations in layers that see all (`far`) and in those with the window."""

  reach: Reach
  far: tuple[llama.Turn, llama.Turn]
  near: tuple[llama.Turn, llama.Turn]


def share(config: Gemma3Config, reach: Reach) -> Shared:
  turn = partial(llama.turns, reach.positions)
  return Shared(
    reach,
    turn(config.frequencies, config.rotation_scale),
    turn(config.local_frequencies, config.local_scale),
  )


class Embeddings(Part):
  """The table of words; those that come in are scaled, the head's are not."""

  @nn.compact
  def __call__(self, input_ids: Ids, positions: Ids) -> tuple[Hidden, Table]:
    words = self.embed(self.config.vocab_size, "embed_tokens")
    # rounded as the words are: in bfloat16 transformers has 25.25 for 25.298
    scale = jnp.asarray(self.config.hidden_size**0.5, self.dtype)
    return scale * words(input_ids), table_of(words, self.dtype)


class Layer(Part):
  @nn.compact
  def __call__(
    self, hidden: Hidden, index: Any, past: Pair | None, shared: Shared
  ) -> tuple[Hidden, Pair | None]:
    # the layer's number is an array where layers are scanned
    slides: Bool[Array, ""] = jnp.array(self.config.slides)[index]
    turn = (
      jnp.where(slides, near, far)
      for near, far in zip(shared.near, shared.far, strict=True)
    )
    normed = norm(self, "input_layernorm")(hidden)
    attention = llama.Attention(*self.settings, norm, name="self_attn")
    context, past = attention(
      normed, index, past, llama.Shared(shared.reach, *turn)
    )
    hidden = hidden + norm(self, "post_attention_layernorm")(context)
    normed = norm(self, "pre_feedforward_layernorm")(hidden)
    inner = llama.FeedForward(*self.settings, name="mlp")(normed)
    hidden = hidden + norm(self, "post_feedforward_layernorm")(inner)
    return hidden, past


PIECES = Pieces(Embeddings, Layer, norm, share)
FAMILY = {
  "gemma3_text": Family(
    config=Gemma3Config.from_dict,
    fields=FIELDS,
    module=partial(module, PIECES),
    inputs=input_shapes,
    names=Names(
      # a larger checkpoint's text part: older files, newer ones
      prefixes=("model.", "language_model.model.", "language_model."),
      outside=("lm_head",),
      unused=("vision_tower.", "multi_modal_projector."),
      tied=("lm_head.weight", "embeddings.embed_tokens.weight"),
      to_file=llama.to_file,
      to_tree=llama.to_tree,
    ),
    rules=llama.RULES,
    room=lambda config: config.max_position_embeddings,
    classes={HEAD: "Gemma3ForCausalLM"},
  )
}
