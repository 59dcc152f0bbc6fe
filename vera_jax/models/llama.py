"""Llama, and with its switches Mistral, Ministral, Qwen2 and Qwen3.

(arXiv 2302.13971, 2310.06825, 2407.10671, 2505.09388.) Rotary positions, keys
and values in fewer heads than queries, a gated feed-forward layer, RMSNorm.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from vera_jax.errors import UserError
from vera_jax.models.decoder import (
  HEAD,
  Hidden,
  Mask,
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
  Fields,
  Names,
  field_table,
  one_of,
  positive,
  sliding_layers,
  take_fields,
)
from vera_jax.models.part import Part
from vera_jax.operations.attention import ACTIVATIONS, Ids, rotate

Activation = Callable[[Array], Array]
# config.json's model_type -> transformers' class, and what stands in its files'
# place where they leave it out. transformers reads a Mistral with `layer_types`
# as a Ministral.
MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
QWEN = {"sliding_window": 4096, "max_window_layers": 28}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
  "llama": ("LlamaForCausalLM", {}),
  "mistral": ("MistralForCausalLM", MISTRAL),
  "ministral": ("MinistralForCausalLM", MISTRAL),
  "qwen2": ("Qwen2ForCausalLM", QWEN),
  "qwen3": ("Qwen3ForCausalLM", {**QWEN, "head_dim": 128}),
}
USED = (
  "attention_dropout head_dim hidden_act hidden_size initializer_range"
  " intermediate_size layer_types max_position_embeddings num_attention_heads"
  " num_hidden_layers num_key_value_heads original_max_position_embeddings"
  " rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings"
  " vocab_size"
)
WINDOWS = "max_window_layers sliding_window use_sliding_window"
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
# Of each kind: what is used beside `USED`, and what else is fixed.
OWN: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
  "llama": (
    "attention_bias mlp_bias",
    {"sliding_window": (None,), "use_sliding_window": (False, None)},
  ),
  "mistral": ("sliding_window", NO_BIAS),
  "ministral": ("sliding_window", NO_BIAS),
  "qwen2": (WINDOWS, {**NO_BIAS, "attention_bias": (True, None)}),
  "qwen3": (f"{WINDOWS} attention_bias", {"mlp_bias": (False, None)}),
}


def field_table_of(kind: str) -> Fields:
  """A kind's fields; the unused ones are of training, and of old files."""
  used, fixed = OWN[kind]
  return field_table(
    f"{USED} {used}",
    unused="is_decoder is_llama_config max_sequence_length pretraining_tp",
    fixed={
      **CAUSAL,
      "attention_chunk_size": (None,),
      "no_rope_layers": (None, []),
      "partial_rotary_factor": (1, None),
      "rope_interleaved": (False, None),
      "use_mrope": (False, None),
      **fixed,
    },
  )


ORIGINAL = "original_max_position_embeddings"
ROTATIONS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROTATION_FIELDS = Fields(
  used=frozenset(
    "attention_factor beta_fast beta_slow factor high_freq_factor long_factor"
    " low_freq_factor mscale mscale_all_dim original_max_position_embeddings"
    " rope_theta rope_type short_factor truncate type".split()
  ),
  unused=frozenset({"finetuned"}),
  fixed={"partial_rotary_factor": (1, None)},
)
Turn = Float[Array, "rows length 1 _"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The fields of a Hugging Face config.json that the model reads.

  Attributes:
    frequencies: of the rotations, in radians per position, one for each two
      dimensions of a head.
    rotation_scale: what the rotated vectors are multiplied by.
    sliding_window: how many tokens the layers that slide see at most.
    slides: whether a layer does, of each.
    qkv_bias, out_bias: whether the attention's layers have biases.
    head_norms: whether each head of queries and keys is normalised.
  """

  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  intermediate_size: int
  max_position_embeddings: int
  frequencies: tuple
  rotation_scale: float
  slides: tuple
  qkv_bias: bool
  out_bias: bool
  head_norms: bool
  sliding_window: int | None = None
  mlp_bias: bool = False
  tie_word_embeddings: bool = False
  hidden_act: str = "silu"
  rms_norm_eps: float = 1e-6
  initializer_range: float = 0.02
  attention_dropout: float = 0.0

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
    """Picks the model's fields; what it can't honour is a UserError."""
    kind = one_of(fields, "model_type", KINDS)
    known = {"hidden_act": "silu", **KINDS[kind][1], **fields}
    one_of(known, "hidden_act", ACTIVATIONS)
    one_of({"attention_bias": False, **known}, "attention_bias", (True, False))
    one_of(known, "use_sliding_window", (True, False, None))
    derived: dict[str, Any] = {
      "frequencies": (),
      "rotation_scale": 1.0,
      "slides": (),
      "qkv_bias": kind == "qwen2",
      "out_bias": False,
      "head_norms": kind == "qwen3",
    }
    if kind in ("llama", "qwen3"):
      bias = known.get("attention_bias", False)
      derived |= {"qkv_bias": bias, "out_bias": bias}
    if known.get("num_key_value_heads") is None:
      derived["num_key_value_heads"] = known.get("num_attention_heads")
    if known.get("head_dim") is None:
      heads = known.get("num_attention_heads") or 1
      derived["head_dim"] = int(known.get("hidden_size") or 0) // int(heads)
    if kind.startswith("qwen") and not known.get("use_sliding_window"):
      derived["sliding_window"] = None
    config = take_fields(cls, {**known, **derived})
    check_heads(config)
    frequencies, scale = rotations(known, config)
    return dataclasses.replace(
      config,
      slides=slides_of(known, config),
      frequencies=frequencies,
      rotation_scale=scale,
    )

  @property
  def score_scale(self) -> float:
    """What the products of queries and keys are multiplied by."""
    return self.head_dim**-0.5


def check_heads(config: Any) -> None:
  """Refuses heads that can't be grouped, or whose width has no halves."""
  if config.num_attention_heads % config.num_key_value_heads:
    raise UserError(
      f"config.json: num_attention_heads {config.num_attention_heads} does"
      f" not divide into num_key_value_heads {config.num_key_value_heads}."
    )
  if config.head_dim % 2:
    raise UserError(
      f"config.json: heads of width {config.head_dim}; rotations need an even"
      " one."
    )


def slides_of(fields: Mapping[str, Any], config: Any) -> tuple[bool, ...]:
  """Which layers have the sliding window, by `layer_types`; without it, those
  from `max_window_layers` on."""
  layers, window = config.num_hidden_layers, config.sliding_window
  if window is not None:
    positive(fields, "sliding_window")
  slides = sliding_layers(fields, layers)
  if slides is None:
    first = fields.get("max_window_layers", 0)
    return tuple(window is not None and i >= first for i in range(layers))
  if window is None and any(slides):
    raise UserError(
      "config.json: one of layer_types is 'sliding_attention', but there is no"
      " sliding_window, or use_sliding_window is not true."
    )
  return slides


def rotation_fields(fields: Mapping[str, Any], *, room: int) -> dict[str, Any]:
  """The rotations' numbers in one place, as transformers 5 writes them.

  Older files have them in `rope_scaling`, and some of them beside it.

  Args:
    fields: of config.json.
    room: its max_position_embeddings.

  Raises:
    UserError: a kind that isn't known, or another one for each kind of layer.
  """
  scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
  if any(isinstance(value, Mapping) for value in scaling.values()):
    raise UserError(
      "config.json: rope_parameters differ by layer; this model has one kind."
    )
  scaling = ROTATION_FIELDS.take(scaling, inside="rope_parameters.")
  scaling = {
    name: value for name, value in scaling.items() if value is not None
  }
  theta = fields.get("rope_theta")
  rope = {
    "rope_theta": 10_000.0 if theta is None else theta,
    ORIGINAL: room,
    "rope_type": scaling.pop("type", "default"),
    **scaling,
  }
  one_of(rope, "rope_type", ROTATIONS)
  one_of(rope, "truncate", (True, False, None), inside="rope_parameters.")
  if fields.get(ORIGINAL) is not None:  # goes first in transformers as well
    rope[ORIGINAL] = fields[ORIGINAL]
  return rope


def rotations(
  fields: Mapping[str, Any], config: Any
) -> tuple[tuple[float, ...], float]:
  """The frequencies, and the scale, by `rope_parameters` or `rope_scaling`.

  The base's powers (RoFormer, arXiv 2104.09864), stretched for longer texts:
  all alike (linear), the slow ones (llama3), by how often they turn over the
  original length (yarn, arXiv 2309.00071), or each by a number of its own
  (longrope, arXiv 2402.13753). "dynamic" stretches only what is longer than
  `max_position_embeddings`, for which there is no room here.

  Raises:
    UserError: another kind, or one that lacks a number.
  """
  room = config.max_position_embeddings
  rope = rotation_fields(fields, room=room)
  kind = rope["rope_type"]

  def number(name: str, default: float | None = None) -> float:
    return positive({name: default, **rope}, name, inside="rope_parameters.")

  theta, original = number("rope_theta"), number(ORIGINAL)
  width = config.head_dim
  powers = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  plain = 1 / np.float32(theta) ** powers
  frequencies, scale = plain, 1.0
  if kind == "linear":
    frequencies = plain / np.float32(number("factor"))
  elif kind == "llama3":
    factor = number("factor")
    low, high = (number(f"{name}_freq_factor") for name in ("low", "high"))
    if high <= low:
      raise UserError(
        f"config.json: llama3 rotations with high_freq_factor {high:g}, which"
        f" must be above low_freq_factor {low:g}."
      )
    turns = original * plain / np.float32(2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    frequencies = (1 - share) * plain / np.float32(factor) + share * plain
  elif kind == "longrope":
    factors = rope.get("short_factor")
    if room > original and factors != rope.get("long_factor"):
      raise UserError(
        "config.json: rope_parameters: longrope with other factors for texts"
        f" beyond {original:g} tokens; this model has one list of them."
      )
    if not isinstance(factors, list | tuple) or len(factors) != width // 2:
      raise UserError(
        f"config.json: rope_parameters: longrope without {width // 2} factors."
      )
    for factor in factors:
      positive({"short_factor": factor}, "short_factor", inside="one of ")
    frequencies = plain / np.array(factors, np.float32)
    factor = number("factor", room / original)
    if factor > 1:
      scale = math.sqrt(1 + math.log(factor) / math.log(original))
    scale = number("attention_factor", scale)
  elif kind == "yarn":
    factor = number("factor", room / original)
    fast, slow = number("beta_fast", 32), number("beta_slow", 1)
    # The dimensions that turn `fast` and `slow` times over the original length.
    first, last = (
      width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
      for turns in (fast, slow)
    )
    if rope.get("truncate", True):
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0
    pairs = np.arange(width // 2, dtype=np.float32)
    share = np.clip((pairs - first) / (last - first), 0, 1)
    frequencies = plain / np.float32(factor) * share + plain * (1 - share)
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    up, down = (
      1 + 0.1 * weight * math.log(max(factor, 1.0))
      for weight in (
        (number("mscale"), number("mscale_all_dim")) if both else (1.0, 0.0)
      )
    )
    scale = number("attention_factor", up / down)
  return tuple(map(float, frequencies)), scale


def norm(part: Part, name: str) -> nn.Module:
  """RMSNorm, of which the backward pass keeps the input alone."""
  return nn.remat(nn.RMSNorm)(
    epsilon=part.config.rms_norm_eps,
    dtype=part.dtype,
    param_dtype=part.param_dtype,
    name=name,
  )


class Shared(NamedTuple):
  """What all layers are given: masks, and the rotations by position."""

  reach: Reach
  cos: Turn
  sin: Turn


def share(config: LlamaConfig, reach: Reach) -> Shared:
  """The masks, with the rotations at the tokens' positions."""
  frequencies, scale = config.frequencies, config.rotation_scale
  return Shared(reach, *turns(reach.positions, frequencies, scale))


def turns(
  positions: Ids, frequencies: tuple[float, ...], scale: float
) -> tuple[Turn, Turn]:
  """The cosines and sines of the rotations at some positions."""
  each = jnp.asarray(frequencies, jnp.float32)[None, None, None]
  angles = positions[..., None, None] * each
  # XLA would compute them anew in each layer
  cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
  return scale * cos, scale * sin


class Embeddings(Part):
  @nn.compact
  def __call__(self, input_ids: Ids, positions: Ids) -> tuple[Hidden, Table]:
    words = self.embed(self.config.vocab_size, "embed_tokens")
    return words(input_ids), table_of(words, self.dtype)


class Attention(Part):
  """Attention; `norm` makes the modules that normalise queries and keys."""

  norm: Callable[[Part, str], nn.Module] = norm

  @nn.compact
  def __call__(
    self, hidden: Hidden, index: Any, past: Pair | None, shared: Shared
  ) -> tuple[Hidden, Pair | None]:
    config = self.config
    query, key, value = (
      self.dense(heads * config.head_dim, name, bias=config.qkv_bias)(
        hidden
      ).reshape(*hidden.shape[:-1], heads, config.head_dim)
      for name, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
        ("v_proj", config.num_key_value_heads),
      )
    )
    if config.head_norms:
      query = self.norm(self, "q_norm")(query)
      key = self.norm(self, "k_norm")(key)
    query, key = (rotate(x, shared.cos, shared.sin) for x in (query, key))
    if past is not None:
      past = write(past, key, value, shared.reach)
    context = attend_cached(
      query,
      key,
      value,
      _mask(config, index, shared.reach),
      past=past,
      scale=config.score_scale,
      dropout=lambda x: self.dropout(x, config.attention_dropout),
    )
    dense = self.dense(config.hidden_size, "o_proj", bias=config.out_bias)
    return dense(context), past


def _mask(config: Any, index: Any, reach: Reach) -> Mask:
  """That of a layer, whose number is an array where layers are scanned."""
  if reach.window is None or not any(config.slides):
    return reach.whole
  if all(config.slides):
    return reach.window
  return jnp.where(jnp.array(config.slides)[index], reach.window, reach.whole)


@partial(jax.checkpoint, static_argnums=2)
def _gated(gate: Hidden, up: Hidden, activation: Activation) -> Hidden:
  """Its inputs are kept for the backward pass, and nothing in between, which
  would be three more arrays of the layer's largest size."""
  return activation(gate) * up


class FeedForward(Part):
  @nn.compact
  def __call__(self, hidden: Hidden) -> Hidden:
    config = self.config
    gate, up = (
      self.dense(config.intermediate_size, name, bias=config.mlp_bias)(hidden)
      for name in ("gate_proj", "up_proj")
    )
    inner = _gated(gate, up, ACTIVATIONS[config.hidden_act])
    dense = self.dense(config.hidden_size, "down_proj", bias=config.mlp_bias)
    return dense(inner)


class Layer(Part):
  @nn.compact
  def __call__(
    self, hidden: Hidden, index: Any, past: Pair | None, shared: Shared
  ) -> tuple[Hidden, Pair | None]:
    normed = norm(self, "input_layernorm")(hidden)
    attention = Attention(*self.settings, name="self_attn")
    context, past = attention(normed, index, past, shared)
    hidden = hidden + context
    normed = norm(self, "post_attention_layernorm")(hidden)
    hidden = hidden + FeedForward(*self.settings, name="mlp")(normed)
    return hidden, past


PIECES = Pieces(Embeddings, Layer, norm, share)


def to_file(name: str) -> str:
  name = re.sub(r"^encoder\.layer\b", "layers", name)
  return re.sub(r"^(encoder|embeddings)\.", "", name)


def to_tree(name: str) -> str:
  # frequencies that older files have among the weights
  name = re.sub(r"^(layers\..*\.inv_freq)$", r"buffers.\1", name)
  name = re.sub(r"^embed_tokens\b", "embeddings.embed_tokens", name)
  name = re.sub(r"^layers\b", "encoder.layer", name)
  return re.sub(r"^norm\b", "encoder.norm", name)


RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"encoder/.*(q|k|v|gate|up)_proj/kernel", ("fsdp", "tensor")),
  (r"encoder/.*(q|k|v|gate|up)_proj/bias", ("tensor",)),
  (r"encoder/.*(o|down)_proj/kernel", ("tensor", "fsdp")),
  (r"embeddings/.*/embedding", (None, "fsdp")),
  (r"lm_head/embedding", ("tensor", "fsdp")),
)
FAMILY = {
  kind: Family(
    config=LlamaConfig.from_dict,
    fields=field_table_of(kind),
    module=partial(module, PIECES),
    inputs=input_shapes,
    names=Names(
      prefixes=("model.",),
      outside=("lm_head",),
      unused=("buffers.",),
      tied=("lm_head.weight", "embeddings.embed_tokens.weight"),
      to_file=to_file,
      to_tree=to_tree,
    ),
    rules=RULES,
    room=lambda config: config.max_position_embeddings,
    classes={HEAD: name},
  )
  for kind, (name, _) in KINDS.items()
}
