"""Each field of a config.json is used, changes nothing, or is refused.

transformers is the reference: its config classes say which fields there are,
and its torch models (parity tests) what they change.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.models.decoders import GPT2, LLAMA
from tests.models.test_families import FIELDS
from tests.models.test_vision import FIELDS as VISION
from vera_jax.errors import UserError
from vera_jax.models.decoder import Decoder, logits
from vera_jax.models.family import FAMILIES, config_of, family_of
from vera_jax.models.hf_weights import load_params

BERT = {
  "vocab_size": 50,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 20,
}
BASES = {
  **{
    kind: {**BERT, "model_type": kind}
    for kind in ("bert", "roberta", "xlm-roberta", "camembert")
  },
  **FIELDS,
  **VISION,
  "gpt2": GPT2,
  **{
    kind: {**LLAMA, "model_type": kind, "head_dim": 4}
    for kind in ("llama", "mistral", "ministral", "qwen2", "qwen3")
  },
  "gemma3_text": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8},
}
ORIGINAL = "original_max_position_embeddings"
SLIDES = ["sliding_attention", "full_attention"]
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 3.0], "factor": 2.0}
DROP = object()  # the field is left out
# Another value of a field; or several, and what must change with it.
OTHERS = {
  "_out_features": None,
  "_out_indices": None,
  "activation": "silu",
  "activation_function": "relu",
  "attention_chunk_size": 4,
  "bos_token_id": 3,
  "classifier_activation": "relu",
  "classifier_dropout": 0.4,
  "classifier_pooling": "mean",
  "dim": 32,
  "dtype": "float32",
  "eos_token_id": 3,
  "global_attn_every_n_layers": {
    "global_attn_every_n_layers": 2,
    "layer_types": DROP,
  },
  "global_rope_theta": 30.0,
  "head_dim": 4,
  "hidden_act": "swish",
  "hidden_activation": "silu",
  "hidden_size": 32,
  "label2id": {"label2id": {"no": 0, "yes": 1}},
  "layer_norm_eps": 0.1,
  "layer_norm_epsilon": 0.1,
  "layer_types": SLIDES,
  "local_attention": 8,
  "local_rope_theta": 3.0,
  "mlp_ratio": 3,
  "n_embd": 32,
  "n_head": 4,
  "n_heads": 4,
  "n_inner": 20,
  "no_rope_layers": [1, 0],
  "norm_eps": 0.1,
  "num_key_value_heads": 1,
  "num_attention_heads": 4,
  ORIGINAL: {ORIGINAL: 6, "rope_scaling": LLAMA3},
  "out_features": ["stage1"],
  "out_indices": [1],
  "pad_token_id": 3,
  "partial_rotary_factor": 0.5,
  "patch_size": 3,
  "per_layer_config": {"per_layer_config": {"0": {"hidden_size": 8}}},
  "pooler_act": "relu",
  "position_embedding_type": "relative_key",
  "query_pre_attn_scalar": 4,
  "pruned_heads": {"pruned_heads": {"0": [1]}},
  "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
  "return_dict": True,
  "rms_norm_eps": 0.1,
  "rope_parameters": [
    {"rope_parameters": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 4.0}},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": {**LLAMA3, ORIGINAL: 6}},
    {
      "rope_parameters": {**LONG, "long_factor": [1.0, 3.0]},
      ORIGINAL: 6,
    },
    {"rope_parameters": {**LONG, "long_factor": [2.0, 2.0]}},
    {
      "rope_parameters": {**LONG, "long_factor": [2.0, 2.0]},
      ORIGINAL: 6,
    },
  ],
  "rope_scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
  "rope_local_base_freq": 30.0,
  "rope_theta": 30.0,
  "sliding_window": 4,
  "sliding_window_pattern": 2,
  "stage_names": ["stem", "stage1"],
  "summary_activation": "tanh",
  "summary_type": "mean",
  "transformers_version": "4.0.0",
}
SPECIAL = {
  ("ministral", "num_attention_heads"): 2,
  ("mistral", "layer_types"): {"layer_types": SLIDES, "head_dim": 4},
  ("mistral", "num_attention_heads"): 2,
  ("qwen2", "num_attention_heads"): 2,
  ("qwen3", "num_attention_heads"): 2,
  ("llama", "num_attention_heads"): 2,
  ("modernbert", "layer_types"): ["full_attention", *SLIDES],
  ("modernbert", "num_hidden_layers"): {
    "num_hidden_layers": 2,
    "layer_types": SLIDES,
  },
  ("modernbert", "rope_parameters"): {
    "rope_parameters": {
      "full_attention": {"rope_type": "default", "rope_theta": 20.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
    }
  },
  ("gemma3_text", "rope_parameters"): [
    {
      "rope_parameters": {
        "full_attention": {**LLAMA3, ORIGINAL: 6, "rope_theta": 20.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0},
      },
      "sliding_window_pattern": 2,
    },
    {"rope_parameters": {"full_attention": {"rope_theta": 20.0}}},
  ],
  ("gemma3_text", "rope_scaling"): {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window_pattern": 2,
  },
  ("gemma3_text", "rope_theta"): {
    "rope_theta": 30.0,
    "sliding_window_pattern": 2,
  },
  ("roberta", "pad_token_id"): 3,
  ("distilbert", "hidden_size"): {"dim": DROP, "hidden_size": 32},
  ("distilbert", "num_hidden_layers"): {
    "n_layers": DROP,
    "num_hidden_layers": 3,
  },
  ("distilbert", "num_attention_heads"): {
    "n_heads": DROP,
    "num_attention_heads": 4,
  },
  ("gpt2", "hidden_size"): {"n_embd": DROP, "hidden_size": 32},
  ("gpt2", "num_hidden_layers"): {"n_layer": DROP, "num_hidden_layers": 3},
  ("gpt2", "num_attention_heads"): {"n_head": DROP, "num_attention_heads": 4},
  ("gpt2", "max_position_embeddings"): {
    "n_positions": DROP,
    "max_position_embeddings": 30,
  },
  ("vit", "image_size"): 16,
  ("dinov2", "image_size"): 16,
}
QWEN = {"use_sliding_window": True, "sliding_window": 3}
for _kind in ("gpt2", "llama", "mistral", "ministral", "qwen2", "qwen3") + (
  "gemma3_text",
):
  SPECIAL[_kind, "is_causal"] = False
SPECIAL["qwen2", "attention_bias"] = False
QWENS = ("qwen2", "qwen3")
for _kind in QWENS:
  SPECIAL |= {
    (_kind, "use_sliding_window"): {**QWEN, "max_window_layers": 0},
    (_kind, "sliding_window"): [{"sliding_window": 3}, QWEN],
    (_kind, "max_window_layers"): {**QWEN, "max_window_layers": 1},
    (_kind, "layer_types"): [{"layer_types": SLIDES, **QWEN}, SLIDES],
  }
COMMON = {"architectures", "id2label", "model_type", "num_labels"}
# What is used, and refused at the other value all the same: heads of another
# width, layers with a window where there is none, two lists of factors.
REFUSED = {
  **{kind: {"head_dim"} for kind in ("dinov2", "modernbert", "vit")},
  "llama": {"rope_parameters", "layer_types"},
  **{kind: {"layer_types"} for kind in QWENS},
}
# Kinds that another one's code reads: only their own fields are walked.
LIKE = {
  **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "bert"),
  **dict.fromkeys(("mistral", "ministral", *QWENS), "llama"),
}


def class_fields(kind):
  """The fields of transformers' config class."""
  config = transformers.CONFIG_MAPPING[kind]
  return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("kind", BASES)
def test_every_field_is_in_one_group(kind):
  table = family_of({"model_type": kind}).fields
  groups = (table.used, table.unused, frozenset(table.fixed))
  assert sum(map(len, groups)) == len(frozenset.union(*groups))
  assert class_fields(kind) <= frozenset.union(*groups)


def test_every_family_is_walked():
  own = {kind for kind in FAMILIES if family_of({"model_type": kind}).own}
  assert BASES.keys() | own == FAMILIES.keys()


@pytest.mark.parametrize("kind", BASES)
def test_what_is_left_out_is_as_transformers_has_it(kind):
  base = BASES[kind]
  own = {name: value for name, value in base.items() if name != "model_type"}
  written = transformers.CONFIG_MAPPING[kind](**own).to_dict()
  assert config_of(written) == config_of(base)


def test_fields_that_no_table_has_are_named_once(caplog):
  fields = {**LLAMA, "logit_scale": 2, "rope_parameters": {"turns": 3}}
  assert config_of(fields) == config_of(fields) == config_of(LLAMA)
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2
  assert "looked at: logit_scale." in said[0]
  assert "looked at: rope_parameters.turns." in said[1]


@pytest.mark.parametrize(
  "kind, changes, words",
  [
    ("mistral", {"layer_types": ["full_attention", "chunked"]}, "'chunked'"),
    ("mistral", {"layer_types": SLIDES, "sliding_window": None}, "is no"),
    ("qwen2", {"layer_types": "sliding_attention"}, "no list of 2"),
    ("llama", {"is_causal": False}, "is_causal is False"),
    ("llama", {"is_causal": None}, "is_causal is None"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": float("nan")}}, "nan"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": None}}, "factor is None"),
    ("llama", {"quantization_config": {"bits": 4}}, "supports none"),
    ("llama", {"num_hidden_layers": -1}, "num_hidden_layers -1, .*too small"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistral", {"sliding_window": 2**31}, "sliding_window 2147.*too large"),
    ("gpt2", {"n_positions": 10**15}, "max_position_embeddings 1000.*large"),
    ("roberta", {"pad_token_id": 10**6}, "none of the .* positions is left"),
    ("gpt2", {"n_embd": 16, "hidden_size": 32}, "two names for one thing"),
    ("modernbert", {"rope_parameters": {"rope_theta": 5.0}}, "kind of layer"),
  ],
)
def test_fields_at_other_values_are_refused(kind, changes, words):
  with pytest.raises(UserError, match=words):
    config_of({**BASES[kind], **changes})


def test_rotations_of_older_and_newer_files():
  """`rope_theta: null` is the default's, and llama3 needs no old length."""
  rope = {**LLAMA3, ORIGINAL: LLAMA["max_position_embeddings"]}
  same = (
    {"rope_scaling": LLAMA3, "rope_theta": None},
    {"rope_parameters": {**rope, "rope_theta": 10_000.0}},
    {"rope_scaling": {**rope, ORIGINAL: 5}, ORIGINAL: rope[ORIGINAL]},
  )
  assert len({config_of({**LLAMA, **one}).frequencies for one in same}) == 1


def changes_of(kind, name, default):
  """The changes of a field that are tried, each a dict of fields."""
  if (kind, name) in SPECIAL or name in OTHERS:
    value = SPECIAL.get((kind, name), OTHERS.get(name))
  elif isinstance(default, bool) or default is None:
    value = not default
  else:
    value = default + (1 if isinstance(default, int) else 0.5)
  lists = isinstance(value, list) and isinstance(value[0], dict)
  values = value if lists else [value]
  return [x if isinstance(x, dict) else {name: x} for x in values]


def torch_peer(fields):
  """transformers' model with weights that are drawn by their names."""
  import torch

  own = dict(fields)
  kind = own.pop("model_type")
  if kind == "mistral" and "layer_types" in fields:
    kind = "ministral"  # as transformers' AutoConfig reads it
  name = next(iter(family_of({"model_type": kind}).classes.values()))
  config = transformers.CONFIG_MAPPING[kind](**own)
  peer = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for name, value in peer.named_parameters():
      torch.manual_seed(zlib.crc32(name.encode()))
      value.normal_(std=0.3)
      value.add_("norm" in name.lower() and name.endswith("weight"))
  return peer


def shapes_of(peer):
  return {name: leaf.shape for name, leaf in peer.named_parameters()}


def batch_of(config):
  rng = np.random.default_rng(0)
  if hasattr(config, "patch_size"):
    size = (2, 3, config.image_size, config.image_size)
    return {"pixel_values": rng.standard_normal(size).astype(np.float32)}
  arrays = {"input_ids": rng.integers(5, 50, (2, 9))}
  if hasattr(config, "type_vocab_size"):
    arrays["token_type_ids"] = rng.integers(0, 2, (2, 9))
  return arrays


def torch_answers(peer, arrays):
  import torch

  with torch.no_grad():
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    found = peer(**tensors)
  return found.logits.numpy()


def our_answers(fields, folder, arrays, shapes):
  module = module_of(fields)
  loaded = load_params(folder, shapes)
  assert loaded[1:3] == ((), ())
  found = module.apply({"params": loaded.params}, **arrays)
  return logits(found) if isinstance(module, Decoder) else found[:, 0]


def module_of(fields):
  family = family_of(fields)
  head = next(iter(family.classes))
  return family.module(config_of(fields), head, 2, scan=False)


def our_arrays(module, arrays):
  if "pixel_values" in arrays:
    arrays = {"pixel_values": arrays["pixel_values"].transpose(0, 2, 3, 1)}
  elif not isinstance(module, Decoder):
    arrays = {**arrays, "segment_ids": np.ones((2, 9), np.int32)}
  return {name: jnp.asarray(x) for name, x in arrays.items()}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BASES)
def test_every_field_is_used_as_transformers_does_or_refused(kind, tmp_path):
  """With another value the answers are torch's, or the field is refused.

  Not where its tensors have other shapes: a size that is read wrongly is an
  error by itself.
  """
  pytest.importorskip("torch")
  base, like = BASES[kind], LIKE.get(kind)
  ours, table = config_of(base), family_of(base).fields
  peer, module = torch_peer(base), module_of(base)
  batch = batch_of(peer.config)
  arrays = our_arrays(module, batch)
  plain, shapes = torch_answers(peer, batch), shapes_of(peer)
  defaults = peer.config.to_dict()
  template = jax.eval_shape(module.init, jax.random.key(0), **arrays)["params"]
  names = (table.used | table.fixed.keys() | class_fields(kind)) - COMMON
  if like:
    other = family_of(BASES[like]).fields
    own = {name for own, name in SPECIAL if own == kind}
    names -= (other.used | class_fields(like)) - own - table.fixed.keys()
  refused = set()
  for name in sorted(names):
    for change in changes_of(kind, name, defaults.get(name)):
      fields = {k: v for k, v in {**base, **change}.items() if v is not DROP}
      try:
        found = config_of(fields)
      except UserError as error:
        assert name in str(error)
        refused.add(name)
        continue
      peer = torch_peer(fields)
      if shapes_of(peer) != shapes:
        continue
      want = torch_answers(peer, batch)
      if found == ours:
        np.testing.assert_allclose(want, plain, atol=1e-4, err_msg=f"{change}")
        continue
      peer.save_pretrained(tmp_path)
      got = our_answers(fields, tmp_path, arrays, template)
      np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"{change}")
  assert refused == table.fixed.keys() | REFUSED.get(kind, set()) & names
