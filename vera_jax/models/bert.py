"""BERT and RoBERTa encoders, each with its own classification head.

XLM-R and CamemBERT are RoBERTa with another vocabulary.

Module and parameter names are Hugging Face's, so that a path in the tree
reads like a name in a checkpoint. Several examples may share one row: segment
ids number them from 1 (0 is padding) and attention stays inside a segment.

Every projection is a plain `nn.Dense`, and the scanned stack carries every
variable collection on a leading layer axis, so that whatever is put on from
outside follows the layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vera_jax.errors import UserError
from vera_jax.models import part
from vera_jax.models.family import (
  BOTH_WAYS,
  Family,
  Names,
  field_table,
  one_of,
  take_fields,
)
from vera_jax.models.part import apply_layers, with_remat
from vera_jax.operations.attention import (
  ACTIVATIONS,
  Ids,
  Mask,
  Places,
  fill_inputs,
  input_shapes,
  same_segment,
)

# The shapes that the model's pieces pass on: `slots` are the examples of a row.
Hidden = Float[Array, "rows length hidden"]
Inner = Float[Array, "rows length inner"]
Read = Float[Array, "rows reads hidden"]
Logits = Float[Array, "rows reads labels"]

# config.json's model_type -> the name in transformers' classes, and the words
# that a file has before the encoder's names.
KINDS = {
  "bert": ("Bert", "bert"),
  "roberta": ("Roberta", "roberta"),
  "xlm-roberta": ("XLMRoberta", "roberta"),
  "camembert": ("Camembert", "roberta"),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The fields of a Hugging Face config.json that the model reads."""

  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  pad_token_id: int
  type_vocab_size: int = 2
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02
  hidden_dropout_prob: float = 0.1
  attention_probs_dropout_prob: float = 0.1
  classifier_dropout: float | None = None

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "BertConfig":
    """Picks the model's fields; what it can't honour is a UserError."""
    kind = one_of(fields, "model_type", KINDS)
    pad = 0 if kind == "bert" else 1
    return cls.checked({"pad_token_id": pad, **fields})

  @classmethod
  def checked(cls, fields: Mapping[str, Any]) -> "BertConfig":
    """Of fields that all have BERT's names."""
    one_of({"hidden_act": "gelu", **fields}, "hidden_act", ACTIVATIONS)
    config = take_fields(cls, fields)
    if config.first_position >= config.max_position_embeddings:
      raise UserError(
        f"config.json: with pad_token_id {config.pad_token_id} none of the"
        f" {config.max_position_embeddings} positions is left for a text."
      )
    return config

  @property
  def first_position(self) -> int:
    """The row of the position table that an example's first token uses."""
    _, base = KINDS.get(self.model_type, ("", ""))
    return self.pad_token_id + 1 if base == "roberta" else 0


FIELDS = field_table(
  "attention_probs_dropout_prob classifier_dropout hidden_act"
  " hidden_dropout_prob hidden_size initializer_range intermediate_size"
  " layer_norm_eps max_position_embeddings num_attention_heads"
  " num_hidden_layers pad_token_id type_vocab_size vocab_size",
  # of pretraining, and of the pooler in BERT's first code
  unused="directionality pooler_fc_size pooler_num_attention_heads"
  " pooler_num_fc_layers pooler_size_per_head pooler_type tie_word_embeddings",
  fixed={**BOTH_WAYS, "position_embedding_type": ("absolute", None)},
)


class Part(part.Part):
  """A piece of the network, with its norm and its usual rate of dropout."""

  config: BertConfig

  @nn.nowrap
  def norm(self, hidden: Array, name: str = "LayerNorm") -> Array:
    return nn.LayerNorm(
      epsilon=self.config.layer_norm_eps,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      use_fast_variance=False,
      name=name,
    )(hidden)

  @nn.nowrap
  def dropout(self, hidden: Array, rate: float | None = None) -> Array:
    rate = self.config.hidden_dropout_prob if rate is None else rate
    return super().dropout(hidden, rate)


class Embeddings(Part):
  @nn.compact
  def __call__(
    self, input_ids: Ids, token_type_ids: Ids, positions: Ids
  ) -> Hidden:
    config = self.config
    words = self.embed(config.vocab_size, "word_embeddings")
    types = self.embed(config.type_vocab_size, "token_type_embeddings")
    places = self.embed(config.max_position_embeddings, "position_embeddings")
    hidden = words(input_ids) + types(token_type_ids)
    hidden = hidden + places(positions + config.first_position)
    return self.dropout(self.norm(hidden))


class SelfAttention(Part):
  @nn.compact
  def __call__(self, read: Read, hidden: Hidden, mask: Mask) -> Read:
    return self.attention(read, hidden, mask)


class Output(Part):
  """Projects back to the hidden width, adds the residual, normalises."""

  @nn.compact
  def __call__(self, inner: Inner, residual: Hidden) -> Hidden:
    inner = self.dense(self.config.hidden_size, "dense")(inner)
    return self.norm(self.dropout(inner) + residual)


class Attention(Part):
  @nn.compact
  def __call__(self, read: Read, hidden: Hidden, mask: Mask) -> Read:
    context = SelfAttention(*self.settings, name="self")(read, hidden, mask)
    return Output(*self.settings, name="output")(context, read)


class Intermediate(Part):
  @nn.compact
  def __call__(self, hidden: Hidden) -> Inner:
    inner = self.dense(self.config.intermediate_size, "dense")(hidden)
    return ACTIVATIONS[self.config.hidden_act](inner)


class Layer(Part):
  """Applies one layer: queries from `read`, keys and values from `hidden`."""

  @nn.compact
  def __call__(self, read: Read, hidden: Hidden, mask: Mask) -> Read:
    read = Attention(*self.settings, name="attention")(read, hidden, mask)
    inner = Intermediate(*self.settings, name="intermediate")(read)
    return Output(*self.settings, name="output")(inner, read)


def _everywhere(
  layer: nn.Module, hidden: Hidden, extra: None, mask: Mask
) -> tuple[Hidden, None]:
  """A layer at every position, as `apply_layers` calls it."""
  return layer(hidden, hidden, mask), None


class Encoder(Part):
  """All layers; the last one at the positions that the head reads, or at all.

  Past its keys and values the last layer mixes no positions, so nothing of it
  need be computed where the head does not read.
  """

  scan: bool
  remat: str
  kind: Any = Layer

  @nn.compact
  def __call__(
    self, hidden: Hidden, segment_ids: Ids, cls_positions: Places | None
  ) -> Read:
    inner = self.config.num_hidden_layers - 1
    mask = same_segment(segment_ids, segment_ids)
    layer = with_remat(self.kind, self.remat, scan=self.scan)
    hidden, _ = apply_layers(
      self, layer, _everywhere, hidden, [None] * inner, mask
    )
    read = hidden
    if cls_positions is not None:
      read = jnp.take_along_axis(hidden, cls_positions[..., None], axis=1)
      segments = jnp.take_along_axis(segment_ids, cls_positions, axis=1)
      mask = same_segment(segments, segment_ids)
    return layer(*self.settings, name=f"layer_{inner}")(read, hidden, mask)


class Pooler(Part):
  @nn.compact
  def __call__(self, hidden: Read) -> Read:
    return nn.tanh(self.dense(self.config.hidden_size, "dense")(hidden))


class RobertaHead(Part):
  outputs: int

  @nn.compact
  def __call__(self, read: Read) -> Logits:
    rate = self.config.classifier_dropout
    inner = self.dense(self.config.hidden_size, "dense")
    read = nn.tanh(inner(self.dropout(read, rate)))
    return self.dense(self.outputs, "out_proj")(self.dropout(read, rate))


class BertClassifier(nn.Module):
  """Encoder and head: token ids to one row of outputs for each example.

  With `head="token_classification"` there is one for each token instead.

  `scan` stacks all layers but the last on a leading axis (compiled once, under
  `layer`) instead of `layer_0`, `layer_1`, ...; `remat` is "none", "full" (keep
  nothing inside a layer) or "dots" (keep the projections' outputs). `dtype`
  computes and `param_dtype` stores the encoder; the head, which is trained,
  stays in float32.
  """

  config: BertConfig
  outputs: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  scan: bool = True
  remat: str = "none"
  head: str = "classification"

  @nn.compact
  def __call__(
    self,
    input_ids: Ids,
    token_type_ids: Ids | None = None,
    positions: Ids | None = None,
    segment_ids: Ids | None = None,
    cls_positions: Places | None = None,
    *,
    deterministic: bool = True,
  ) -> Logits:
    """Logits in float32 of the examples whose first tokens are named.

    With the head for tokens: of every token, [rows, length, labels].

    Without `segment_ids` a row is one example, padded with the pad token;
    `positions` restart at 0 in each example (RoBERTa's offset is added here);
    `cls_positions` are the columns that the head reads, column 0 by default.
    Positions past the position table give NaN.
    """
    if token_type_ids is None:
      token_type_ids = jnp.zeros_like(input_ids)
    positions, segment_ids, cls_positions = fill_inputs(
      input_ids,
      positions,
      segment_ids,
      cls_positions,
      pad=self.config.pad_token_id,
    )
    settings = (self.config, self.dtype, self.param_dtype, deterministic)
    hidden = Embeddings(*settings, name="embeddings")(
      input_ids, token_type_ids, positions
    )
    encoder = Encoder(*settings, self.scan, self.remat, name="encoder")
    if self.head == "token_classification":
      read = encoder(hidden, segment_ids, None)
      return self.plain_head(read.astype(jnp.float32), deterministic)
    read = encoder(hidden, segment_ids, cls_positions)
    if self.config.model_type == "bert":
      read = Pooler(*settings, name="pooler")(read)
      return self.plain_head(read.astype(jnp.float32), deterministic)
    head = RobertaHead(
      self.config,
      jnp.float32,
      jnp.float32,
      deterministic,
      self.outputs,
      name="classifier",
    )
    return head(read.astype(jnp.float32))

  def plain_head(self, read: Read, deterministic: bool) -> Logits:
    rate = self.config.classifier_dropout
    if rate is None:
      rate = self.config.hidden_dropout_prob
    read = nn.Dropout(rate, deterministic=deterministic)(read)
    return nn.Dense(
      self.outputs,
      dtype=jnp.float32,
      param_dtype=jnp.float32,
      kernel_init=nn.initializers.normal(self.config.initializer_range),
      name="classifier",
    )(read)


ENCODER = r".*(query|key|value|intermediate/dense)"
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (rf"{ENCODER}/kernel", ("fsdp", "tensor")),
  (rf"{ENCODER}/bias", ("tensor",)),
  (r"encoder/.*output/dense/kernel", ("tensor", "fsdp")),
  (r".*word_embeddings/embedding", (None, "fsdp")),
)


def _family(kind: str) -> Family:
  def module(config: BertConfig, head: str, outputs: int, **options: Any):
    return BertClassifier(config, outputs, head=head, **options)

  name, base = KINDS[kind]
  return Family(
    config=BertConfig.from_dict,
    fields=FIELDS,
    module=module,
    inputs=input_shapes,
    names=Names(
      prefixes=(f"{base}.", "bert.", "roberta."),
      renamed=(
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
      ),
      unused=(
        "embeddings.position_ids",
        "embeddings.token_type_ids",
        "cls.",
        "lm_head.",
        "pooler.",  # left over only where the model, as RoBERTa's, has none
      ),
      new=("classifier/", "pooler/"),
    ),
    rules=RULES,
    room=lambda c: c.max_position_embeddings - c.first_position,
    classes={
      "classification": f"{name}ForSequenceClassification",
      "token_classification": f"{name}ForTokenClassification",
    },
  )


FAMILY = {kind: _family(kind) for kind in KINDS}
