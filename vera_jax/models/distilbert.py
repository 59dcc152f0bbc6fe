"""DistilBERT: BERT's encoder without token types, and a head of its own.

Names are Hugging Face's, but for BERT's `query`, `key` and `value` in place of
`q_lin`, `k_lin` and `v_lin`, and `encoder` for `transformer`, so that the same
targets serve both families.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from vera_jax.models.bert import (
  BertConfig,
  Encoder,
  Hidden,
  Logits,
  Part,
  Read,
)
from vera_jax.models.family import (
  BOTH_WAYS,
  Family,
  Names,
  field_table,
  one_of,
  renamed,
)
from vera_jax.operations.attention import (
  ACTIVATIONS,
  Ids,
  Mask,
  Places,
  fill_inputs,
  input_shapes,
)

# The file's words -> BERT's, of config.json and of modules.
WORDS = {
  "dim": "hidden_size",
  "n_layers": "num_hidden_layers",
  "n_heads": "num_attention_heads",
  "hidden_dim": "intermediate_size",
  "activation": "hidden_act",
  "dropout": "hidden_dropout_prob",
  "attention_dropout": "attention_probs_dropout_prob",
  "seq_classif_dropout": "classifier_dropout",
}
MODULES = {
  "transformer": "encoder",
  "q_lin": "query",
  "k_lin": "key",
  "v_lin": "value",
}
INPUTS = ("input_ids", "positions", "segment_ids", "cls_positions")
FIELDS = field_table(
  "activation attention_dropout dim dropout hidden_dim hidden_size"
  " initializer_range max_position_embeddings n_heads n_layers"
  " num_attention_heads num_hidden_layers pad_token_id seq_classif_dropout"
  " vocab_size",
  # the table of positions is in the files, sinusoidal or not
  unused="qa_dropout sinusoidal_pos_embds tie_weights_ tie_word_embeddings",
  fixed={**BOTH_WAYS, "position_embedding_type": ("absolute", None)},
)


def read_config(fields: Mapping[str, Any]) -> BertConfig:
  """config.json in BERT's words; what can't be honoured is a UserError."""
  one_of(fields, "model_type", ("distilbert",))
  one_of({"activation": "gelu", **fields}, "activation", ACTIVATIONS)
  defaults = {"pad_token_id": 0, "classifier_dropout": 0.2}
  return BertConfig.checked({**defaults, **renamed(fields, WORDS)})


class Embeddings(Part):
  @nn.compact
  def __call__(self, input_ids: Ids, positions: Ids) -> Hidden:
    config = self.config
    words = self.embed(config.vocab_size, "word_embeddings")
    places = self.embed(config.max_position_embeddings, "position_embeddings")
    hidden = words(input_ids) + places(positions)
    return self.dropout(self.norm(hidden))


class Attention(Part):
  @nn.compact
  def __call__(self, read: Read, hidden: Hidden, mask: Mask) -> Read:
    context = self.attention(read, hidden, mask)
    return self.dense(hidden.shape[-1], "out_lin")(context)


class FeedForward(Part):
  @nn.compact
  def __call__(self, read: Read) -> Read:
    inner = self.dense(self.config.intermediate_size, "lin1")(read)
    inner = ACTIVATIONS[self.config.hidden_act](inner)
    return self.dropout(self.dense(self.config.hidden_size, "lin2")(inner))


class Layer(Part):
  """Applies one layer: queries from `read`, keys and values from `hidden`."""

  @nn.compact
  def __call__(self, read: Read, hidden: Hidden, mask: Mask) -> Read:
    # unlike BERT's, the attention's output has no dropout
    context = Attention(*self.settings, name="attention")(read, hidden, mask)
    read = self.norm(context + read, "sa_layer_norm")
    inner = FeedForward(*self.settings, name="ffn")(read)
    return self.norm(inner + read, "output_layer_norm")


class DistilBertClassifier(nn.Module):
  """As `bert.BertClassifier`; both layers of the head are trained."""

  config: BertConfig
  outputs: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  scan: bool = True
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    input_ids: Ids,
    positions: Ids | None = None,
    segment_ids: Ids | None = None,
    cls_positions: Places | None = None,
    *,
    deterministic: bool = True,
  ) -> Logits:
    """Logits in float32; the inputs are `BertClassifier`'s, without types."""
    positions, segment_ids, cls_positions = fill_inputs(
      input_ids,
      positions,
      segment_ids,
      cls_positions,
      pad=self.config.pad_token_id,
    )
    settings = (self.config, self.dtype, self.param_dtype, deterministic)
    hidden = Embeddings(*settings, name="embeddings")(input_ids, positions)
    encoder = Encoder(*settings, self.scan, self.remat, Layer, name="encoder")
    read = encoder(hidden, segment_ids, cls_positions).astype(jnp.float32)

    def dense(features: int, name: str) -> nn.Dense:
      start = nn.initializers.normal(self.config.initializer_range)
      return nn.Dense(features, kernel_init=start, name=name)

    read = nn.relu(dense(self.config.hidden_size, "pre_classifier")(read))
    rate = self.config.classifier_dropout or 0.0
    read = nn.Dropout(rate, deterministic=deterministic)(read)
    return dense(self.outputs, "classifier")(read)


def module(config: BertConfig, head: str, outputs: int, **options: Any):
  return DistilBertClassifier(config, outputs, **options)


def _renamed(words: Mapping[str, str]):
  return lambda name: ".".join(words.get(w, w) for w in name.split("."))


FAMILY = {
  "distilbert": Family(
    config=read_config,
    fields=FIELDS,
    module=module,
    inputs=lambda rows, length, slots: input_shapes(
      rows, length, slots, names=INPUTS
    ),
    names=Names(
      prefixes=("distilbert.",),
      outside=("classifier", "pre_classifier"),
      unused=(
        "embeddings.position_ids",
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "qa_outputs.",
      ),
      new=("classifier/", "pre_classifier/"),
      to_file=_renamed({ours: file for file, ours in MODULES.items()}),
      to_tree=_renamed(MODULES),
    ),
    rules=(
      (r"encoder/.*(query|key|value|lin1)/kernel", ("fsdp", "tensor")),
      (r"encoder/.*(query|key|value|lin1)/bias", ("tensor",)),
      (r"encoder/.*(out_lin|lin2)/kernel", ("tensor", "fsdp")),
      (r".*word_embeddings/embedding", (None, "fsdp")),
    ),
    room=lambda config: config.max_position_embeddings,
    classes={"classification": "DistilBertForSequenceClassification"},
    head="(pre_)?classifier/.*",
  )
}
