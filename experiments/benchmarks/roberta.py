"""RoBERTa's shapes, for what is counted without its weights."""

from typing import Any


def roberta(width: int, layers: int) -> dict[str, Any]:
  """config.json of base (768, 12), large (1024, 24) or some of their layers."""
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
