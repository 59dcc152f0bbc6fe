"""A trained adapter as two small files: `adapter.json`, `adapter.safetensors`.

The tensors are the trained leaves (d, b, head) under the names that Hugging
Face gives their layers: `encoder.layer.3.attention.self.query.vera_d`. In the
file those of consecutive layers are one (`layer_stacks`), whether the model's
stack was scanned or not. The JSON says what they belong to: method and
settings, base and its fingerprint, the projections' digest.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vera_jax.adapters.layer_stacks import stack_layers, unstack_layers
from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json
from vera_jax.models.hf_weights import module_name

ABOUT, TENSORS = "adapter.json", "adapter.safetensors"
BOTH = f"An adapter is the two files {ABOUT} and {TENSORS}."
# 1 had a tensor a layer, and no number; it is read all the same.
FORMAT = 2
# The init of projections that no seed gives: A and B then lie in the file.
STORED = "stored"
SHA256 = "tensors_sha256"
# What an adapter is put back by, and the JSON types of it.
NEEDED: dict[str, tuple[type, ...]] = {
  "method": (str,),
  "settings": (dict,),
  "base": (str,),
  "base_fingerprint": (str,),
  "labels": (list,),
  "projection_prng": (str,),
  "projection_digest": (str, type(None)),
}


class SavedAdapter(NamedTuple):
  """What the two files hold; `folder` is where they were read."""

  about: dict[str, Any]
  tensors: dict[str, np.ndarray]
  folder: Path


def named_slices(
  path: tuple[str, ...], leaf: Any
) -> Iterator[tuple[str, Any | None]]:
  """A leaf's name in the file and its value; one a layer of a stacked leaf.

  A leaf of shapes only (`jax.ShapeDtypeStruct`) gives the names and None.
  """
  stacked = "layer" in path
  for i in range(leaf.shape[0] if stacked else 1):
    module = module_name(path[:-1], layer=i if stacked else None)
    value = None
    if isinstance(leaf, np.ndarray):
      value = leaf[i] if stacked else leaf
    yield f"{module}.{path[-1]}", value


def tensors(trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The trained leaves by name, stacked layers taken apart."""
  return {
    name: np.ascontiguousarray(value)
    for path, leaf in flatten_dict(dict(trained)).items()
    for name, value in named_slices(path, np.asarray(leaf))
  }


def save_adapter(
  folder: str | Path, trained: Mapping[str, Any], *, about: Mapping[str, Any]
) -> None:
  """Write both files.

  Args:
    folder: made when missing.
    trained: the trainable leaves, from `labels.split`.
    about: JSON values for adapter.json; `NEEDED` lists those that
      `load_adapter` asks for. The format's number and a checksum of the
      tensors are added.
  """
  folder = Path(folder).expanduser()
  data = save(stack_layers(tensors(trained)))
  checksum = hashlib.sha256(data).hexdigest()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(data)
    write_json(folder / ABOUT, {**about, "format": FORMAT, SHA256: checksum})
  except OSError as error:
    raise UserError(f"{folder} can't be written: {error.strerror}.") from error


def load_adapter(folder: str | Path) -> SavedAdapter:
  """Read an adapter's folder; `classifier.restore_adapter` puts it on a base.

  Raises:
    UserError: a file that is missing, damaged or not of this adapter.
  """
  folder = Path(folder).expanduser()
  if not folder.is_dir():
    raise UserError(f"There is no adapter folder {folder}.")
  about = _read_about(folder / ABOUT)
  data = _read(folder / TENSORS)
  checksum = hashlib.sha256(data).hexdigest()
  if about.get(SHA256, checksum) != checksum:
    raise UserError(
      f"{folder / TENSORS} is not the file that {ABOUT} was written with: its"
      " checksum differs. It is damaged or another adapter's; copy both again."
    )
  try:
    found = unstack_layers(load(data))
  except UserError as error:
    raise UserError(f"{folder / TENSORS}: {error}") from error
  except (SafetensorError, ValueError, KeyError) as error:
    raise UserError(
      f"{folder / TENSORS} is no whole safetensors file ({error}); copy it"
      " again."
    ) from error
  wrong = [name for name, value in found.items() if not _is_sound(value)]
  if wrong:
    raise UserError(
      f"{folder / TENSORS}: {', '.join(wrong[:3])} holds values that are not"
      " finite numbers."
    )
  return SavedAdapter(about, found, folder)


def _is_sound(values: np.ndarray) -> bool:
  floating = np.issubdtype(values.dtype, np.floating)
  return floating and bool(np.isfinite(values).all())


def _read(file: Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise UserError(
      f"{file} can't be read: {error.strerror}. {BOTH}"
    ) from error


def _read_about(file: Path) -> dict[str, Any]:
  about = read_json(file, hint=BOTH)
  number = about.get("format", 1)
  if number not in range(1, FORMAT + 1):
    raise UserError(
      f"{file} has format {number!r}; this vera_jax reads formats up to"
      f" {FORMAT}. It was written by a newer one, or changed by hand."
    )
  lacking = [
    name
    for name, kinds in NEEDED.items()
    if name not in about or not isinstance(about[name], kinds)
  ]
  if lacking:
    raise UserError(f"{file} has no usable {', '.join(lacking)}.")
  return about
