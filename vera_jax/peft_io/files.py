"""The two kinds of adapter folder as tensors and words."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vera_jax.errors import UserError
from vera_jax.models.hf_weights import FLOATS

PEFT_FILE = "adapter_model.safetensors"
# In an exported file's header: our adapter.json, a checksum of the tensors.
OURS, SHA256 = "vera_jax", "vera_jax_sha256"
PREFIX = "base_model.model."
PAIR = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
LEAVES = {
  "vera": {"vera_lambda_d": "vera_d", "vera_lambda_b": "vera_b"},
  "lora": {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"},
}


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """All tensors in float32, and the adapter.json that the header may carry."""
  if not file.is_file() and file.with_suffix(".bin").is_file():
    raise UserError(
      f"{file.with_suffix('.bin')} is torch's pickle format, which is not read"
      " here. Load the adapter in PEFT and save it again: save_pretrained"
      " writes safetensors."
    )
  try:
    with safe_open(file, framework="numpy") as opened:
      for name in opened.keys():
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in FLOATS:
          raise UserError(
            f"{file}: {name!r} is stored as {dtype}; only"
            f" {', '.join(FLOATS)} can be read."
          )
      tensors = {
        name: np.asarray(opened.get_tensor(name), np.float32)
        for name in opened.keys()
      }
      metadata = opened.metadata() or {}
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is missing or no whole safetensors file ({error}); fetch or"
      " copy it again."
    ) from error
  _check_values(file, tensors, metadata.get(SHA256))
  return tensors, _carried(metadata)


def _check_values(
  file: Path, tensors: Mapping[str, np.ndarray], known: str | None
) -> None:
  """PEFT's own files have no checksum: there, damage may show as no number."""
  wrong = [name for name, x in tensors.items() if not np.isfinite(x).all()]
  if wrong:
    raise UserError(
      f"{file}: {', '.join(wrong[:3])} holds values that are not finite"
      " numbers."
    )
  if known not in (None, checksum(tensors)):
    raise UserError(
      f"{file} is damaged: its tensors differ from those that were exported."
      " Copy or export it again."
    )


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
  """sha256 over names and float32 values, in the names' order."""
  sha = hashlib.sha256()
  for name in sorted(tensors):
    sha.update(name.encode())
    sha.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
  return sha.hexdigest()


def _carried(metadata: Mapping[str, str]) -> dict[str, Any]:
  try:
    about = json.loads(metadata.get(OURS, "{}"))
  except ValueError:
    return {}
  return about if isinstance(about, dict) else {}


def check_free(folder: Path) -> None:
  """Nothing is written over."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} is there already; choose another --out.")
