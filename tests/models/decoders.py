"""Tiny decoders of every kind, and batches for them."""

import jax.numpy as jnp
import numpy as np

SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
  **SIZES,
  "model_type": "gpt2",
  "n_embd": 16,
  "n_layer": 2,
  "n_head": 2,
  "n_positions": 24,
}
LLAMA = {
  **SIZES,
  "model_type": "llama",
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 24,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 20,
  "rope_theta": 100.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0}
QWEN = {"use_sliding_window": True, "sliding_window": 3}
CASES = {
  "gpt2": GPT2,
  "gpt2_odd": {
    **GPT2,
    "n_inner": 24,
    "activation_function": "gelu",
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False,
  },
  "llama": LLAMA,
  "llama_biases": {
    **LLAMA,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "rope_parameters": LLAMA3,
  },
  "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
  "qwen2": {
    **LLAMA,
    **QWEN,
    "model_type": "qwen2",
    "max_window_layers": 1,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
  },
  "qwen3": {
    **LLAMA,
    **QWEN,
    "model_type": "qwen3",
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": YARN,
  },
  "gemma3_text": {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 8,
    "query_pre_attn_scalar": 6,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "rope_theta": 300.0,
    "rope_local_base_freq": 20.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
  },
}
LENGTHS = (9, 3, 7)


def texts() -> list[list[int]]:
  rng = np.random.default_rng(1)
  return [rng.integers(3, 50, n).tolist() for n in LENGTHS]


def packed_and_padded() -> tuple[dict, dict]:
  """The texts in two rows, and each in a row of its own."""
  first, second, third = texts()
  packed = {
    "input_ids": [first + second + [0], third + [0] * 6],
    "positions": [[*range(9), *range(3), 0], [*range(7), *[0] * 6]],
    "segment_ids": [[1] * 9 + [2] * 3 + [0], [1] * 7 + [0] * 6],
  }
  padded = {
    "input_ids": [t + [0] * (9 - len(t)) for t in (first, second, third)],
    "segment_ids": [[1] * n + [0] * (9 - n) for n in LENGTHS],
  }
  made = [
    {name: jnp.asarray(rows, jnp.int32) for name, rows in batch.items()}
    for batch in (packed, padded)
  ]
  return made[0], made[1]


def unpacked(rows: np.ndarray) -> list[np.ndarray]:
  """What `packed` has at the tokens of each text."""
  return [rows[0, :9], rows[0, 9:12], rows[1, :7]]


def random_peer(fields, folder, **options):
  """A random torch model, saved in a folder."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**fields)
  peer = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, value in peer.named_parameters():
      value.normal_(std=0.3)
      value.add_(("norm" in name or "ln_" in name) and "weight" in name)
  peer.save_pretrained(folder, **options)
  return peer
