"""RoBERTa's shapes, for what is counted without its weights."""

from typing import Any

SIZES = {"roberta-base": (768, 12), "roberta-large": (1024, 24)}


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
