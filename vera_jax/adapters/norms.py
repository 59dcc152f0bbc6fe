"""How long the trained vectors are, layer by layer: the paper's Figure 3."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vera_jax.adapters.files import load_adapter

NAME = re.compile(
  r"(?:.*\.)?encoder\.layer\.(?P<layer>\d+)\.(?P<kind>.+)"
  r"\.(?P<leaf>vera_[db]|lora_[AB])"
)
SHORT = {
  "attention.self.query": "query",
  "attention.self.key": "key",
  "attention.self.value": "value",
  "attention.output.dense": "attention output",
  "intermediate.dense": "intermediate",
  "output.dense": "output",
}


class Vector(NamedTuple):
  """One trained leaf: of which layer, and its length.

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
  """Of a saved adapter's leaves, by layer.

  Args:
    tensors: by their names in the file, as `load_adapter` gives them.
  """
  return sorted(_vectors(tensors))


def _vectors(tensors: Mapping[str, np.ndarray]) -> Iterator[Vector]:
  for name, value in tensors.items():
    match = NAME.fullmatch(name)
    if match is None:
      continue  # the head's
    norm = float(np.linalg.norm(value.astype(np.float64)))
    kind = SHORT.get(match["kind"], match["kind"])
    rms = norm / np.sqrt(value.size)
    leaf = match["leaf"][-1]
    yield Vector(int(match["layer"]), kind, leaf, value.size, norm, float(rms))


def as_json(vectors: list[Vector]) -> list[dict[str, Any]]:
  """As a result.json keeps them; four digits are more than a figure shows."""
  return [
    {**v._asdict(), "norm": _rounded(v.norm), "rms": _rounded(v.rms)}
    for v in vectors
  ]


def _rounded(value: float) -> float:
  return float(f"{value:.4g}")


def norms_beside(folder: Path) -> list[dict[str, Any]]:
  """From the adapter in a run's folder; none where that holds no adapter."""
  if not (folder / "adapter").is_dir():
    return []
  return as_json(adapter_norms(load_adapter(folder / "adapter").tensors))
