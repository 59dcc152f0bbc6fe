"""config.json of models whose weights need not be there to be counted.

By their names on the hub, with the fields of their public files that say how
large they are and what they compute. Where a folder has that name, it goes
first.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vera_jax.models.paper_sizes import SIZES, roberta

# Of Llama 3.1: the slow rotations are stretched.
STRETCHED = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


def llama(
  width: int, inner: int, layers: int, heads: int, **others: Any
) -> Mapping[str, Any]:
  """A Llama's fields; those of the first one, but for `others`."""
  return MappingProxyType(
    {
      "model_type": "llama",
      "vocab_size": 32000,
      "hidden_size": width,
      "intermediate_size": inner,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "num_key_value_heads": heads,
      "max_position_embeddings": 2048,
      "rms_norm_eps": 1e-6,
      "tie_word_embeddings": False,
      **others,
    }
  )


LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3 = {
  "vocab_size": 128256,
  "num_key_value_heads": 8,
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500_000.0,
}
LLAMA_3_1 = {
  **LLAMA_3,
  "max_position_embeddings": 131_072,
  "rope_scaling": STRETCHED,
}
DECODERS = {
  "huggyllama/llama-7b": llama(4096, 11008, 32, 32),
  "huggyllama/llama-13b": llama(5120, 13824, 40, 40),
  "meta-llama/Llama-2-7b-hf": llama(4096, 11008, 32, 32, **LLAMA_2),
  "meta-llama/Llama-2-13b-hf": llama(5120, 13824, 40, 40, **LLAMA_2),
  "meta-llama/Meta-Llama-3-8B": llama(4096, 14336, 32, 32, **LLAMA_3),
  "meta-llama/Llama-3.1-70B": llama(8192, 28672, 80, 64, **LLAMA_3_1),
  "meta-llama/Llama-3.1-405B": llama(16384, 53248, 126, 128, **LLAMA_3_1),
  "Qwen/Qwen3-32B": llama(
    *(5120, 25600, 64, 64),
    model_type="qwen3",
    vocab_size=151_936,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rope_theta=1_000_000.0,
    use_sliding_window=False,
  ),
}


def gpt2(width: int, layers: int) -> dict[str, Any]:
  """config.json of a GPT-2."""
  return {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": width,
    "n_layer": layers,
    "n_head": width // 64,
  }


def vit(width: int, layers: int) -> dict[str, Any]:
  """config.json of a ViT that cuts 224 x 224 pixels into patches of 16 x 16."""
  return {
    "model_type": "vit",
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": width // 64,
    "intermediate_size": 4 * width,
    "image_size": 224,
    "patch_size": 16,
  }


KNOWN: Mapping[str, Mapping[str, Any]] = {
  **{name: roberta(*shape) for name, shape in SIZES.items()},
  **DECODERS,
  "gpt2": gpt2(768, 12),
  "gpt2-medium": gpt2(1024, 24),
  "gpt2-large": gpt2(1280, 36),
  "google/vit-base-patch16-224-in21k": vit(768, 12),
  "google/vit-large-patch16-224-in21k": vit(1024, 24),
}
