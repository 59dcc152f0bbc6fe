"""A tiny random decoder in Hugging Face's layout, with a tokenizer of words."""

import json
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vera_jax.models.hf_weights import to_hf
from vera_jax.pretrained.blueprint import blueprint

WORDS = [f"word{i}" for i in range(20)]
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 24,
  "n_embd": 8,
  "n_layer": 2,
  "n_head": 2,
  "n_positions": 24,
  "bos_token_id": 0,
  "eos_token_id": 0,
}
LLAMA = {
  "model_type": "llama",
  "vocab_size": 24,
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "intermediate_size": 12,
  "max_position_embeddings": 24,
  "bos_token_id": 1,
  "eos_token_id": 0,
}


def tokenizer_of_words(**names) -> PreTrainedTokenizerFast:
  """<end> is 0, <begin> 1, <unknown> 2; word0 is 3 and so on."""
  vocabulary = {w: i for i, w in enumerate(["<end>", "<begin>", "<unknown>"])}
  vocabulary |= {word: 3 + i for i, word in enumerate(WORDS)}
  backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<end>", **names
  )


def write_decoder(folder: Path, fields: dict) -> Path:
  plan = blueprint(fields, head="language_modelling", outputs=0, scan=False)
  rng = np.random.default_rng(0)
  params = {
    path: (rng.standard_normal(leaf.shape) / 2 + (path[-1] == "scale")).astype(
      np.float32
    )
    for path, leaf in sorted(plan.shapes.items())
  }
  tensors = to_hf(unflatten_dict(params), plan.config)
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(fields))
  tokenizer_of_words().save_pretrained(folder)
  return folder
