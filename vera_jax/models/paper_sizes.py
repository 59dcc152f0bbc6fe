"""Shapes of the paper's models, for what is counted without their weights."""

from typing import Any

# Width and layers.
SIZES = {"roberta-base": (768, 12), "roberta-large": (1024, 24)}
OTHERS = {
  "gpt2-medium": (1024, 24),
  "gpt2-large": (1280, 36),
  "huggyllama/llama-7b": (4096, 32),
  "huggyllama/llama-13b": (5120, 40),
  "meta-llama/Llama-2-7b-hf": (4096, 32),
  "meta-llama/Llama-2-13b-hf": (5120, 40),
  "google/vit-base-patch16-224-in21k": (768, 12),
  "google/vit-large-patch16-224-in21k": (1024, 24),
}


def roberta(width: int, layers: int) -> dict[str, Any]:
  """config.json of one of `SIZES` (width, layers), or of some of its layers."""
  return {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": width // 64,
    "intermediate_size": 4 * width,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
  }
