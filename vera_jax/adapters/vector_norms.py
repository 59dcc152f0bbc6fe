"""How long the trained vectors are, layer by layer: the paper's Figure 3."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

NAME = re.compile(
  r"(?:.*\.)?encoder\.layer\.(?P<layer>\d+)\.(?P<kind>.+)"
  r"\.(?P<leaf>vera_[db]|lora_[AB])"
)
SHORT = {
  **{
    f"{place}.{part}": part
    for place in ("attention", "attn.Wqkv")
    for part in ("query", "key", "value")
  },
  "attention.self.query": "query",
  "attention.self.key": "key",
  "attention.self.value": "value",
  "attention.output.dense": "attention output",
  "intermediate.dense": "intermediate",
  "output.dense": "output",
}


class Vector(NamedTuple):
  """One trained leaf: where it is, and its length.

  Attributes:
    layer, kind: 3 and "query", say.
    leaf: "d" or "b" of VeRA, "A" or "B" of LoRA.
    size: its number of entries.
    norm: Euclidean; a matrix's is Frobenius'.
    rms: the norm over the square root of the size, free of the rank.
  """

  layer: int
  kind: str
  leaf: str
  size: int
  norm: float
  rms: float


def adapter_norms(tensors: Mapping[str, np.ndarray]) -> list[Vector]:
  """The norms of a saved adapter's leaves, by layer.

  Args:
    tensors: by their names in the file, as `load_adapter` gives them.
  """
  norms = []
  for name, value in tensors.items():
    match = NAME.fullmatch(name)
    if match is None:
      continue  # a leaf of the head
    norm = float(np.linalg.norm(value.astype(np.float64)))
    norms.append(
      Vector(
        layer=int(match["layer"]),
        kind=SHORT.get(match["kind"], match["kind"]),
        leaf=match["leaf"][-1],
        size=value.size,
        norm=norm,
        rms=float(norm / np.sqrt(value.size)),
      )
    )
  return sorted(norms)


def as_json(vectors: list[Vector]) -> list[dict[str, Any]]:
  """As result.json keeps them: four digits, more than a figure shows."""
  return [
    {
      **vector._asdict(),
      "norm": float(f"{vector.norm:.4g}"),
      "rms": float(f"{vector.rms:.4g}"),
    }
    for vector in vectors
  ]
