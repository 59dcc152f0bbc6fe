"""Adapters of parts of a fused kernel, as PEFT's of the whole layer.

PEFT adapts a fused layer whole. With B's rows and b's entries at the parts' own
columns and zeros elsewhere, low-rank deltas of several parts are one delta of
their ranks' sum, exactly: for query and value A' = [A; A], d' = [d_q; d_v],
B' = [[B, 0], [0, 0], [0, B]] and b' = [b_q; 0; b_v].
"""

from collections.abc import Mapping

import numpy as np

from vera_jax.adapters.interface import Target
from vera_jax.peft_io.base import Layer
from vera_jax.peft_io.tensors import Tensors


def with_parts(layers: Mapping[str, Layer]) -> dict[str, Layer]:
  """The layers, and the parts of the fused ones as if they were layers."""
  every = dict(layers)
  for name, layer in layers.items():
    for part, columns in layer.parts.items():
      inputs, width = layer.target.inputs, columns[1] - columns[0]
      every[f"{name}.{part}"] = Layer(
        (*layer.path, part),
        (*layer.kind, part),
        Target(inputs, width, layer.target.stack, columns),
        {},
      )
  return every


def joined(
  leaves: Mapping[str, Tensors], layers: Mapping[str, Layer]
) -> dict[str, dict[str, Tensors]]:
  """The leaves of each layer's parts in the columns' order, "" for a whole."""
  by_layer: dict[str, dict[str, Tensors]] = {}
  for name in sorted(leaves, key=lambda n: layers[n].target.columns or ()):
    whose, part = name, ""
    if layers[name].target.columns:
      whose, part = name.rsplit(".", 1)
    by_layer.setdefault(whose, {})[part] = leaves[name]
  return by_layer


def join_lora(
  layer: Layer, parts: Mapping[str, Tensors], *, rank: int
) -> Tensors:
  """LoRA's A and B of the whole layer, with zeros up to this rank."""
  A = np.zeros((rank, layer.target.inputs), np.float32)
  B = np.zeros((layer.target.outputs, rank), np.float32)
  done = 0
  for part, leaves in parts.items():
    first, last = layer.parts.get(part, (0, layer.target.outputs))
    then = done + len(leaves["lora_A"])
    A[done:then] = leaves["lora_A"]
    B[first:last, done:then] = leaves["lora_B"]
    done = then
  return {"lora_A": A, "lora_B": B}


def join_vera(layer: Layer, parts: Mapping[str, Tensors]) -> Tensors:
  """VeRA's d and b of the whole layer."""
  b = np.zeros(layer.target.outputs, np.float32)
  for part, leaves in parts.items():
    b[slice(*layer.parts[part])] = leaves["vera_b"]
  d = [leaves["vera_d"] for leaves in parts.values()]
  return {"vera_d": np.concatenate(d), "vera_b": b}


def join_pair(
  layer: Layer, parts: Mapping[str, Tensors], pair: Mapping[str, np.ndarray]
) -> Tensors:
  """A and B that all such layers share."""
  rank = len(pair["A"])
  B = np.zeros((layer.target.outputs, rank * len(parts)), np.float32)
  for i, part in enumerate(parts):
    first, last = layer.parts[part]
    B[first:last, i * rank : (i + 1) * rank] = pair["B"][: last - first]
  return {"A": np.tile(pair["A"], (len(parts), 1)), "B": B}
