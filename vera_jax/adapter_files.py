"""A trained adapter as two small files: `adapter.json`, `adapter.safetensors`.

The tensors are the trained leaves (d, b, head) under the names that Hugging
Face gives their layers, one entry a layer whether the stack was scanned or not:
`encoder.layer.3.attention.self.query.vera_d`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from vera_jax.models.hf_weights import module_name
from vera_jax.workdir import write_json


def tensors(trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The trained leaves by name, stacked layers taken apart."""
  named = {}
  for path, leaf in flatten_dict(dict(trained)).items():
    values = np.asarray(leaf)
    stacked = "layer" in path
    for i, value in enumerate(values if stacked else values[None]):
      module = module_name(path[:-1], layer=i if stacked else None)
      named[f"{module}.{path[-1]}"] = np.ascontiguousarray(value)
  return named


def save_adapter(
  folder: Path, trained: Mapping[str, Any], *, about: Mapping[str, Any]
) -> None:
  """Write both files.

  Args:
    folder: made when missing.
    trained: the trainable leaves, from `labels.split`.
    about: JSON values for adapter.json: method, rank, seed, digest, base, ….
  """
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors(trained), folder / "adapter.safetensors")
  write_json(folder / "adapter.json", dict(about))
