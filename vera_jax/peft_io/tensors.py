"""PEFT's adapter_model.safetensors: its tensors, and what our export adds.

An export carries our adapter.json in the file's header, so that the way back
loses nothing, and a checksum of the tensors, which PEFT's own files lack.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vera_jax.adapters.method import LARGEST
from vera_jax.errors import UserError
from vera_jax.files import DATA, check_file, parse_json
from vera_jax.models.safetensors_file import FLOATS

FILE = "adapter_model.safetensors"
# Entries of the header: our adapter.json, the checksum.
METADATA, SHA256 = "vera_jax", "vera_jax_sha256"
PREFIX = "base_model.model."  # what precedes a module's name
Tensors = dict[str, np.ndarray]


def read_tensors(file: Path) -> tuple[Tensors, dict[str, Any]]:
  """All tensors in float32, and the adapter.json of our export, or {}.

  Raises:
    UserError: a file that is missing, damaged or of another type.
  """
  if not file.is_file() and file.with_suffix(".bin").is_file():
    raise UserError(
      f"{file.with_suffix('.bin')} is torch's pickle format, which is not read"
      " here. Load the adapter in PEFT and save it again: save_pretrained"
      " writes safetensors."
    )
  tensors: Tensors = {}
  check_file(file, inside=file.parent, limit=DATA)
  try:
    with safe_open(file, framework="numpy") as opened:
      metadata = opened.metadata() or {}
      for name in opened.keys():
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in FLOATS:
          raise UserError(
            f"{file}: {name!r} is stored as {dtype}; only"
            f" {', '.join(FLOATS)} can be read."
          )
        tensors[name] = np.asarray(opened.get_tensor(name), np.float32)
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is no whole safetensors file ({error}); fetch or copy it again."
    ) from error
  # a NaN is not within the limit either
  wrong = [n for n, x in tensors.items() if not (abs(x) <= LARGEST).all()]
  if wrong:
    raise UserError(
      f"{file}: {', '.join(wrong[:3])} holds values that are not finite"
      f" numbers, or are beyond {LARGEST:.0e}, where products overflow."
    )
  if metadata.get(SHA256) not in (None, checksum(tensors)):
    raise UserError(
      f"{file} is damaged: its tensors differ from those that were exported."
      " Copy or export it again."
    )
  try:
    about = parse_json(metadata.get(METADATA, "{}"))
  except ValueError:
    about = {}
  return tensors, about if isinstance(about, dict) else {}


def write_tensors(
  file: Path, tensors: Mapping[str, np.ndarray], *, about: Mapping[str, Any]
) -> None:
  """Write the tensors, with our adapter.json and a checksum in the header."""
  metadata = {METADATA: json.dumps(about), SHA256: checksum(tensors)}
  written = save(
    {name: np.ascontiguousarray(value) for name, value in tensors.items()},
    metadata={"format": "pt", **metadata},
  )
  file.write_bytes(written)  # a full disk is an OSError, as elsewhere


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
  """sha256 over names and float32 values, in the names' order."""
  sha = hashlib.sha256()
  for name in sorted(tensors):
    sha.update(name.encode())
    sha.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
  return sha.hexdigest()
