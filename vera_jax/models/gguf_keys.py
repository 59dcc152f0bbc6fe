"""What is done with each key of a GGUF file's header.

A key that changes what the network computes, or what ids a text has, and that
nobody reads would give wrong answers without a word. So each key is used here,
or known to change nothing, or refused; one that is in no table is named in a
warning. What a key does is what llama.cpp does with it:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp
"""

import functools
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from vera_jax.errors import UserError

log = logging.getLogger(__name__)
OFF = (0,)  # a switch, a number or a scale that is not there


class Keys(NamedTuple):
  """What is done with the keys below a prefix, by what follows the prefix.

  Attributes:
    used: what is read.
    unused: what changes neither logits nor ids.
    fixed: the values at which a key changes nothing; another is refused. Its
      names are patterns, and the first that fits counts.
  """

  used: frozenset[str]
  unused: frozenset[str]
  fixed: Mapping[str, tuple[Any, ...]]

  def check(
    self, metadata: Mapping[str, Any], *, prefix: str, source: Any
  ) -> None:
    """Warns of the unknown keys of a file.

    Args:
      metadata: of the file.
      prefix: with which the keys begin that are looked at.
      source: names the file.

    Raises:
      UserError: a fixed key has another value.
    """
    unknown = []
    for key, value in metadata.items():
      name = key.removeprefix(prefix)
      if name == key or name in self.used | self.unused:
        continue
      known = [x for x in self.fixed if fnmatchcase(name, x)]
      if not known:
        unknown.append(key)
        continue
      values = self.fixed[known[0]]
      if not all(x in values for x in np.ravel(value).tolist()):
        words = " or ".join(map(repr, values)) or "nothing"
        raise UserError(
          f"{source}: its {key} is not known here as {str(value)[:80]}, but as"
          f" {words}. There is no model here that computes with it."
        )
    if unknown:
      warn(
        f"{source} has keys that are not known here, and are not looked at:"
        f" {', '.join(unknown)[:400]}. If one of them changes what the network"
        " computes, its answers are wrong."
      )


@functools.cache  # once, however often a file is read
def warn(text: str) -> None:
  log.warning("%s", text)


_FIXED: dict[str, tuple[Any, ...]] = {
  "attention.causal": (True,),
  "rope.scaling.attn_factor": (1,),
  "rope.scaling.yarn_attn_factor": (1,),
  "rope.scaling.yarn_beta_fast": (32,),
  "rope.scaling.yarn_beta_slow": (1,),
  "rope.scaling.yarn_ext_factor": (1,),
  "tensor_data_layout": ("Meta AI original pth",),  # of rows in pairs
} | dict.fromkeys(
  (
    "attention.output_scale",
    "attention.value_scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
  ),
  (0, 1),
)
# What other architectures have, and these would have by a mistake.
_FIXED |= dict.fromkeys(
  (
    "activation*",
    "adapters.*",
    "altup.*",
    "attention.clamp_kqv",
    "attention.*group*",
    "attention.indexer.*",
    "attention.max_alibi_bias",
    "attention.*_mla",
    "attention.*rank",
    "attention.recurrent_layers",
    "attention.relative_buckets_count",
    "attention.rope_pattern",
    "attention.scale",
    "attention.shared_kv_layers",
    "attention.sliding_window_pattern",
    "attention.*_swa",
    "attention.temperature_*",
    "attn_*",
    "*block_count",
    "classifier.*",
    "convnext.*",
    "*deepstack*",
    "decoder_*",
    "*_feat_in",
    "*_feat_out",
    "embedding_length_*",
    "expert*",
    "features_length",
    "full_attention_interval",
    "hidden_activation",
    "*interleave_moe_layer_step",
    "kda.*",
    "*_logit_softcapping",
    "moe_*",
    "nextn_predict_layers",
    "num_loops",
    "posnet.*",
    "rescale_every_n_layers",
    "rope.*_swa",
    "rope.dimension_sections",
    "rope.scaling.alpha",
    "rope.scaling.yarn_log_multiplier",
    "shortconv.*",
    "ssm.*",
    "swiglu_clamp_*",
    "swin_norm",
    "time_*",
    "token_shift_count",
    "use_parallel_residual",
    "wkv.*",
    "xielu.*",
  ),
  OFF,
)
_SIZES = (
  "attention.head_count attention.head_count_kv attention.key_length"
  " attention.sliding_window attention.value_length block_count context_length"
  " embedding_length expert_count feed_forward_length"
)
_ROTATIONS = (
  "rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.factor"
  " rope.scaling.original_context_length rope.scaling.type"
)
# The rows of the embedding count, not vocab_size; embeddings are pooled in no
# decoder here.
_UNUSED = "pooling_type rope.scaling.finetuned vocab_size"
_RMS, _LAYER_NORM = (
  f"attention.layer_norm_{kind}epsilon" for kind in ("rms_", "")
)
ROTATING = Keys(
  used=frozenset(f"{_SIZES} {_ROTATIONS} {_RMS}".split()),
  unused=frozenset(f"{_UNUSED} {_LAYER_NORM}".split()),
  fixed=_FIXED,
)
# Rotations of the layers with a window, and every how many layers one has none.
GEMMA3 = ROTATING._replace(
  used=ROTATING.used
  | {"attention.sliding_window_pattern", "rope.freq_base_swa"}
)
GPT2 = Keys(  # whose positions are learned
  used=frozenset(f"{_SIZES} {_LAYER_NORM}".split()),
  unused=frozenset(f"{_UNUSED} {_ROTATIONS} {_RMS}".split()),
  fixed=_FIXED,
)
TOKENIZER = Keys(
  used=frozenset(
    "add_bos_token add_eos_token add_space_prefix bos_token_id eom_token_id"
    " eos_token_id eot_token_id merges model padding_token_id pre scores"
    " token_type tokens unknown_token_id".split()
  ),
  unused=frozenset(  # roles that no id of a text comes from
    "cls_token_id fim_mid_token_id fim_pad_token_id fim_pre_token_id"
    " fim_rep_token_id fim_sep_token_id fim_suf_token_id mask_token_id"
    " middle_token_id prefix_token_id seperator_token_id suffix_token_id"
    " token_type_count".split()
  ),
  fixed={
    "add_sep_token": (False,),
    "normalizer.*": (False,),
    "precompiled_charsmap": (),
    "remove_extra_whitespaces": (False,),
    "suppress_tokens": (),
  },
)
