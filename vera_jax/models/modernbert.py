"""ModernBERT: rotary positions, alternating local attention, GeGLU.

(arXiv 2412.13663.) Layers normalise what they read. A layer's fused kernels
are Hugging Face's, `attn/Wqkv` of query, key and value and `mlp/Wi` of input
and gate; targets may name either the kernel or its parts.

The file's `attn_norm` of layer i + 1, which layer 0 has none of, is `next_norm`
of layer i here, so that all layers before the last are alike and can be
scanned. Which of them attend globally is an array of flags.
"""

import dataclasses
import re
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
from vera_jax.models import part
from vera_jax.models.family import (
  BOTH_WAYS,
  Family,
  Fields,
  Names,
  field_table,
  one_of,
  positive,
  sliding_layers,
  take_fields,
)
from vera_jax.models.part import apply_layers, with_remat
from vera_jax.operations.attention import (
  ACTIVATIONS,
  Ids,
  Mask,
  Places,
  attend,
  fill_inputs,
  input_shapes,
  rotate,
  same_segment,
)

Hidden = Float[Array, "rows length hidden"]
Read = Float[Array, "rows reads hidden"]
Logits = Float[Array, "rows slots labels"]
Turn = Float[Array, "rows length 1 _"]
INPUTS = ("input_ids", "positions", "segment_ids", "cls_positions")
KINDS = {"full_attention": "global", "sliding_attention": "local"}
THETA = {"global": 160_000.0, "local": 10_000.0}
FIELDS = field_table(
  "attention_bias attention_dropout classifier_activation classifier_bias"
  " classifier_dropout classifier_pooling embedding_dropout"
  " global_attn_every_n_layers global_rope_theta head_dim hidden_activation"
  " hidden_size initializer_range intermediate_size layer_types"
  " local_attention local_rope_theta max_position_embeddings mlp_bias"
  " mlp_dropout norm_bias norm_eps num_attention_heads num_hidden_layers"
  " pad_token_id rope_parameters vocab_size",
  # the first files have BERT's layer_norm_eps and position_embedding_type too
  unused="decoder_bias deterministic_flash_attn initializer_cutoff_factor"
  " layer_norm_eps position_embedding_type reference_compile"
  " repad_logits_with_grad sparse_pred_ignore_index sparse_prediction"
  " tie_word_embeddings",
  fixed={
    **BOTH_WAYS,
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "sliding_window": (None,),
  },
)
# Of one kind of layers in rope_parameters.
ROTATIONS = Fields(
  used=frozenset({"rope_theta"}),
  fixed={
    "partial_rotary_factor": (1, None),
    "rope_type": ("default", None),
    "type": ("default", None),
  },
)


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
  """The fields of a Hugging Face config.json that the model reads.

  `is_global` says of each layer whether it attends to the whole example;
  `global_theta` and `local_theta` are the bases of the two rotations.
  """

  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  pad_token_id: int
  is_global: tuple
  global_theta: float
  local_theta: float
  local_attention: int = 128
  hidden_activation: str = "gelu"
  classifier_activation: str = "gelu"
  classifier_pooling: str = "cls"
  norm_eps: float = 1e-5
  norm_bias: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  classifier_bias: bool = False
  initializer_range: float = 0.02
  embedding_dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  classifier_dropout: float = 0.0

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModernBertConfig":
    """Picks the model's fields; what it can't honour is a UserError."""
    known: dict[str, Any] = {
      "hidden_activation": "gelu",
      "classifier_activation": "gelu",
      "classifier_pooling": "cls",
      "pad_token_id": 50283,
      **fields,
    }
    one_of(known, "model_type", ("modernbert",))
    one_of(known, "hidden_activation", ACTIVATIONS)
    one_of(known, "classifier_activation", ACTIVATIONS)
    one_of(known, "classifier_pooling", ("cls", "mean"))
    thetas = {f"{kind}_theta": _theta(known, kind) for kind in THETA}
    config = take_fields(cls, {**known, **thetas, "is_global": ()})
    width = config.hidden_size // config.num_attention_heads
    if width % 2:
      raise UserError(
        f"config.json: heads of width {width}; rotations need an even one."
      )
    layers = config.num_hidden_layers
    slides = sliding_layers(known, layers)
    if slides is None:
      every = known.get("global_attn_every_n_layers", 3)
      if not isinstance(every, int) or every < 1:
        raise UserError(
          f"config.json: global_attn_every_n_layers is {every!r}; it is a"
          " whole number, at least 1."
        )
      slides = tuple(i % every > 0 for i in range(layers))
    is_global = tuple(not slide for slide in slides)
    return dataclasses.replace(config, is_global=is_global)


def _theta(fields: Mapping[str, Any], kind: str) -> float:
  """The base of the rotations in one kind of layer (RoFormer's 10000).

  Older files have `global_rope_theta` and `local_rope_theta`, null in the
  latter for the same as global; newer ones `rope_parameters` by layer type.
  """
  name = {ours: theirs for theirs, ours in KINDS.items()}[kind]
  rope = fields.get("rope_parameters") or {}
  if wrong := sorted(rope.keys() - KINDS.keys()):
    raise UserError(
      f"config.json: rope_parameters has {', '.join(wrong)}; this model has"
      f" them by kind of layer, for {' and '.join(KINDS)}."
    )
  inside = f"rope_parameters.{name}."
  rope = ROTATIONS.take(rope.get(name) or {}, inside=inside)
  if rope.get("rope_theta") is not None:
    return positive(rope, "rope_theta", inside=inside)
  older = f"{kind}_rope_theta"
  if fields.get(older, THETA[kind]) is None and kind == "local":
    return _theta(fields, "global")
  return positive({older: THETA[kind], **fields}, older)


class Part(part.Part):
  """A piece of the encoder."""

  @nn.nowrap
  def norm(self, hidden: Array, name: str) -> Array:
    return nn.LayerNorm(
      epsilon=self.config.norm_eps,
      use_bias=self.config.norm_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      use_fast_variance=False,
      name=name,
    )(hidden)


class Embeddings(Part):
  @nn.compact
  def __call__(self, input_ids: Ids) -> Hidden:
    config = self.config
    words = self.embed(config.vocab_size, "tok_embeddings")
    hidden = self.norm(words(input_ids), "norm")
    return self.dropout(hidden, config.embedding_dropout)


class Reach(NamedTuple):
  """What global and local layers each have of their own.

  Attributes:
    mask: which keys a query attends to.
    cos, sin: of the rotations by position, of half a head's width.
  """

  mask: Mask
  cos: Turn
  sin: Turn


class Attention(Part):
  @nn.compact
  def __call__(
    self, normed: Hidden, reach: Reach, reads: Places | None
  ) -> Read:
    config, width = self.config, normed.shape[-1]
    # all positions also for `reads`: the kernel is one, and keys need it
    fused = self.dense(3 * width, "Wqkv", bias=config.attention_bias)(normed)
    query, key, value = (
      x.reshape(*x.shape[:-1], config.num_attention_heads, -1)
      for x in jnp.split(fused, 3, axis=-1)
    )
    query, key = (rotate(x, reach.cos, reach.sin) for x in (query, key))
    if reads is not None:
      query = jnp.take_along_axis(query, reads[..., None, None], axis=1)
    rate = config.attention_dropout
    context = attend(
      query, key, value, reach.mask, dropout=lambda x: self.dropout(x, rate)
    )
    out = self.dense(width, "Wo", bias=config.attention_bias)(context)
    return self.dropout(out, rate)


class FeedForward(Part):
  @nn.compact
  def __call__(self, read: Read) -> Read:
    config = self.config
    wide = 2 * config.intermediate_size
    fused = self.dense(wide, "Wi", bias=config.mlp_bias)(read)
    inner, gate = jnp.split(fused, 2, axis=-1)
    inner = ACTIVATIONS[config.hidden_activation](inner) * gate
    inner = self.dropout(inner, config.mlp_dropout)
    return self.dense(config.hidden_size, "Wo", bias=config.mlp_bias)(inner)


class Layer(Part):
  """Applies one layer; its queries, and all after them, at `reads` only.

  Takes the stream of hidden states and what the layer reads of it, normalised
  by the layer before, and gives both to the next one.
  """

  @nn.compact
  def __call__(
    self, hidden: Hidden, normed: Hidden, reach: Reach, reads: Places | None
  ) -> tuple[Read, Read]:
    if reads is not None:
      hidden = jnp.take_along_axis(hidden, reads[..., None], axis=1)
    attention = Attention(*self.settings, name="attn")
    hidden = hidden + attention(normed, reach, reads)
    read = self.norm(hidden, "mlp_norm")
    hidden = hidden + FeedForward(*self.settings, name="mlp")(read)
    if reads is not None:
      return hidden, hidden
    return hidden, self.norm(hidden, "next_norm")


def _next(
  layer: Layer,
  carry: tuple[Hidden, Hidden],
  is_global: Bool[Array, ""] | bool,
  far: Reach,
  near: Reach,
) -> tuple[tuple[Hidden, Hidden], None]:
  """A layer at every position, as `apply_layers` calls it."""
  pick = partial(jnp.where, is_global)
  return layer(*carry, jax.tree.map(pick, far, near), None), None


class Encoder(Part):
  """All layers; the last one at the positions that the head reads."""

  scan: bool
  remat: str

  @nn.compact
  def __call__(
    self,
    hidden: Hidden,
    positions: Ids,
    segment_ids: Ids,
    reads: Places,
  ) -> Read:
    config, last = self.config, self.config.num_hidden_layers - 1
    # A query sees its own example; in local layers, also by distance.
    read_segments, places = (
      jnp.take_along_axis(x, reads, axis=1) for x in (segment_ids, positions)
    )
    same, read_same = (
      same_segment(x, segment_ids) for x in (segment_ids, read_segments)
    )
    window, read_window = (
      abs(x[:, None, :, None] - positions[:, None, None])
      <= config.local_attention // 2
      for x in (positions, places)
    )
    half = config.hidden_size // config.num_attention_heads // 2
    turns = []
    for theta in (config.global_theta, config.local_theta):
      frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
      angles = positions[..., None, None] * frequencies[None, None, None]
      turns.append((jnp.cos(angles), jnp.sin(angles)))
    far = Reach(same, *turns[0])
    near = Reach(same & window, *turns[1])

    layer = with_remat(Layer, self.remat, scan=self.scan)
    carry = hidden, hidden  # the embeddings are normalised already
    carry, _ = apply_layers(
      self, layer, _next, carry, config.is_global[:last], far, near
    )
    if config.is_global[last]:
      reach = far._replace(mask=read_same)
    else:
      reach = near._replace(mask=read_same & read_window)
    one = layer(*self.settings, name=f"layer_{last}")
    read, _ = one(*carry, reach, reads)
    return self.norm(read, "final_norm")


class Head(Part):
  @nn.compact
  def __call__(self, read: Read) -> Read:
    config = self.config
    dense = self.dense(config.hidden_size, "dense", bias=config.classifier_bias)
    read = ACTIVATIONS[config.classifier_activation](dense(read))
    return self.norm(read, "norm")


class ModernBertClassifier(nn.Module):
  """As `bert.BertClassifier`.

  `head`, which the pretrained files have, is used as it is, like BERT's pooler;
  without it there it is trained. Heads compute in float32.
  """

  config: ModernBertConfig
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
    """Logits in float32; the inputs are `BertClassifier`'s, without types.

    With mean pooling the last layer is computed at all positions, and the
    mean is over the example that has its first token at `cls_positions`.
    """
    config = self.config
    positions, segment_ids, cls_positions = fill_inputs(
      input_ids, positions, segment_ids, cls_positions, pad=config.pad_token_id
    )
    settings = (config, self.dtype, self.param_dtype, deterministic)
    hidden = Embeddings(*settings, name="embeddings")(input_ids)
    encoder = Encoder(*settings, self.scan, self.remat, name="encoder")
    everywhere = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    is_mean = config.classifier_pooling == "mean"
    reads = (
      jnp.broadcast_to(everywhere, input_ids.shape)
      if is_mean
      else cls_positions
    )
    read = encoder(hidden, positions, segment_ids, reads)
    read = read.astype(jnp.float32)
    if is_mean:
      segments = jnp.take_along_axis(segment_ids, cls_positions, axis=1)
      inside = same_segment(segments, segment_ids)[:, 0].astype(jnp.float32)
      inside /= inside.sum(axis=-1, keepdims=True)
      read = jnp.einsum("...rs,...sh->...rh", inside, read)
    settings = (config, jnp.float32, self.param_dtype, deterministic)
    read = Head(*settings, name="head")(read)
    read = nn.Dropout(config.classifier_dropout, deterministic=deterministic)(
      read
    )
    start = nn.initializers.normal(config.hidden_size**-0.5)
    return nn.Dense(self.outputs, kernel_init=start, name="classifier")(read)


def module(config: ModernBertConfig, head: str, outputs: int, **options: Any):
  return ModernBertClassifier(config, outputs, **options)


def fused(config: ModernBertConfig) -> dict[str, dict[str, tuple[int, int]]]:
  """The first and last column of each part of the fused kernels."""
  width, inner = config.hidden_size, config.intermediate_size
  return {
    "Wqkv": {
      name: (i * width, (i + 1) * width)
      for i, name in enumerate(("query", "key", "value"))
    },
    "Wi": {"input": (0, inner), "gate": (inner, 2 * inner)},
  }


def _to_file(name: str) -> str:
  name = re.sub(
    r"^encoder\.layer\.(\d+)\.next_norm\b",
    lambda match: f"layers.{int(match[1]) + 1}.attn_norm",
    name,
  )
  name = re.sub(r"^encoder\.layer\b", "layers", name)
  return re.sub(r"^encoder\.final_norm\b", "final_norm", name)


def _to_tree(name: str) -> str:
  name = re.sub(
    r"^layers\.([1-9]\d*)\.attn_norm\b",
    lambda match: f"encoder.layer.{int(match[1]) - 1}.next_norm",
    name,
  )
  name = re.sub(r"^layers\b", "encoder.layer", name)
  return re.sub(r"^final_norm\b", "encoder.final_norm", name)


FAMILY = {
  "modernbert": Family(
    config=ModernBertConfig.from_dict,
    fields=FIELDS,
    module=module,
    inputs=lambda rows, length, slots: input_shapes(
      rows, length, slots, names=INPUTS
    ),
    names=Names(
      prefixes=("model.",),
      outside=("classifier", "head"),
      unused=("decoder.", "qa_outputs."),
      new=("classifier/", "head/"),
      to_file=_to_file,
      to_tree=_to_tree,
    ),
    # A fused kernel is not split over `tensor`: the cuts would not be those of
    # query, key and value, or of input and gate.
    rules=(
      (r"encoder/.*(Wqkv|Wi)/kernel", ("fsdp", None)),
      (r"encoder/.*Wo/kernel", ("tensor", "fsdp")),
      (r".*tok_embeddings/embedding", (None, "fsdp")),
    ),
    room=lambda config: config.max_position_embeddings,
    classes={"classification": "ModernBertForSequenceClassification"},
    fused=fused,
  )
}
