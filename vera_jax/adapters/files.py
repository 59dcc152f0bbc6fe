"""A trained adapter as two small files: `adapter.json`, `adapter.safetensors`.

Beside them lies README.md, a model card for people and the hub (`card.py`).

The tensors are the trained leaves (d, b, head) under the names that Hugging
Face gives their layers: `encoder.layer.3.attention.self.query.vera_d`. The file
has those of consecutive layers as one, whether the model's stack was scanned or
not. The JSON says what they belong to: method and settings, base and its
fingerprint, the projections' digest.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vera_jax.adapters.card import CARD, model_card
from vera_jax.adapters.method import LARGEST
from vera_jax.errors import UserError
from vera_jax.files import (
  DATA,
  make_folder,
  read_bytes,
  read_json,
  write_file,
  write_json,
  write_text,
)
from vera_jax.hub import snapshot
from vera_jax.layer_names import layer_name
from vera_jax.places import local_copy, place

ABOUT, TENSORS = "adapter.json", "adapter.safetensors"
BOTH = f"An adapter is the two files {ABOUT} and {TENSORS}."
FORMAT = 2  # 1 was never published
SHA256 = "tensors_sha256"
# The fields that restoring an adapter needs, and their JSON types.
NEEDED: dict[str, tuple[type, ...]] = {
  "method": (str,),
  "settings": (dict,),
  "base": (str, type(None)),
  "base_fingerprint": (str,),
  "labels": (list,),
  "projection_prng": (str,),
  "projection_digest": (str, type(None)),
}
# Those that answering texts and images may use; null counts as not there.
USED: dict[str, type] = {
  "task": str,
  "kind": str,
  "columns": list,
  "template": str,
  "separate": bool,
  "image_size": int,
  "quantise": str,
}
SHORTEST = 3  # tokens of a text: the least word, and one before and behind it
Tensors = dict[str, np.ndarray]
A_HUB_ID = "A hub id is owner/name or owner/name@revision."
# What PEFT's folders have in place of adapter.json.
PEFTS, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
HUB_ID = re.compile(
  r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?"
)
# Names of one layer's tensor and of several layers' (from 0 to 23).
ONE = re.compile(r"(.*?\.)(\d+)(\..+)")
SEVERAL = re.compile(r"(.*?\.)(\d+)-(\d+)(\..+)")


class SavedAdapter(NamedTuple):
  """What the two files hold; `folder` is where they were read."""

  about: dict[str, Any]
  tensors: Tensors
  folder: Path

  @property
  def base(self) -> str:
    """The base's name.

    Raises:
      UserError: it has none, since the adapter is of a model of one's own.
    """
    if self.about["base"] is None:
      raise UserError(
        f"The adapter {self.folder} names no base: it was saved from a model of"
        " one's own. In Python, `load` of that model, adapted, reads it."
      )
    return self.about["base"]


def is_stacked(path: tuple[str, ...], leaf: Any) -> bool:
  """Whether a leaf's first axis counts the layers of a stack."""
  return "layer" in path and len(leaf.shape) > 0


def named_slices(
  path: tuple[str, ...], leaf: Any
) -> Iterator[tuple[str, Any | None]]:
  """A leaf's name in the file and its value; one per layer of a stacked leaf.

  A leaf of shapes only (`jax.ShapeDtypeStruct`) gives the names and None.
  """
  stacked = is_stacked(path, leaf)
  for i in range(leaf.shape[0] if stacked else 1):
    module = layer_name(path[:-1], layer=i)
    value = None
    if isinstance(leaf, np.ndarray):
      value = leaf[i] if stacked else leaf
    yield ".".join(filter(None, (module, path[-1]))), value


def tensors(trained: Mapping[str, Any]) -> Tensors:
  """The trained leaves by name, stacked layers taken apart.

  Raises:
    UserError: two leaves would have one name.
  """
  named: Tensors = {}
  for path, leaf in flatten_dict(dict(trained)).items():
    for name, value in named_slices(path, np.asarray(leaf)):
      if name in named:
        raise UserError(
          f"Two leaves have the name {name} in a file: a module named `layer`"
          " is taken for a stack of layers layer_0, layer_1, ... Rename one."
        )
      named[name] = np.asarray(value, order="C")
  return named


def stack_layers(tensors: Mapping[str, np.ndarray]) -> Tensors:
  """Consecutive layers' equal tensors as one, the layers along axis 0.

  A file's header names each tensor in some hundred bytes, which for a deep
  model's biases would be more than 16 KiB. One tensor under
  `encoder.layer.0-23.output.dense.bias` says the same.
  """
  stacked: Tensors = {}
  roles: dict[tuple, dict[int, np.ndarray]] = {}
  for name, value in tensors.items():
    if match := ONE.fullmatch(name):
      role = match[1], match[3], value.shape, value.dtype
      roles.setdefault(role, {})[int(match[2])] = value
    else:
      stacked[name] = value
  for (before, after, *_), layers in roles.items():
    consecutive: list[int] = []
    for number in sorted(layers):
      consecutive.append(number)
      if number + 1 not in layers:
        name = f"{before}{consecutive[0]}-{number}{after}"
        stacked[name] = np.stack([layers[i] for i in consecutive])
        consecutive = []
  return stacked


def unstack_layers(stacked: Mapping[str, np.ndarray]) -> Tensors:
  """The inverse; a tensor whose name has no range of layers stays as it is.

  Raises:
    UserError: a tensor has not the layers that its name says.
  """
  tensors: Tensors = {}
  for name, value in stacked.items():
    match = SEVERAL.fullmatch(name)
    if match is None:
      tensors[name] = value
      continue
    numbers = range(int(match[2]), int(match[3]) + 1)
    # one without an entry could name a thousand million layers
    if value.shape[:1] != (len(numbers),) or not value.size:
      raise UserError(
        f"{name} has shape {value.shape}, but its name says {len(numbers)}"
        " layers."
      )
    for number, layer in zip(numbers, value, strict=True):
      tensors[f"{match[1]}{number}{match[4]}"] = layer
  return tensors


def save_adapter(
  folder: str | Path, trained: Mapping[str, Any], *, about: Mapping[str, Any]
) -> None:
  """Write both files, and the card.

  A new folder appears whole or not at all; in one that is there the files are
  replaced.

  Args:
    folder: made when missing.
    trained: the trainable leaves, from `labels.split`.
    about: JSON values for adapter.json; `NEEDED` lists those that
      `load_adapter` asks for. The format's number and a checksum of the
      tensors are added.

  Raises:
    UserError: the folder can't be written, or `about` lacks a field.
  """
  folder = place(folder)
  check_needed(about, folder / ABOUT)
  data = save(stack_layers(tensors(trained)))
  checksum = hashlib.sha256(data).hexdigest()

  def fill(folder: Path) -> None:
    write_file(folder / TENSORS, lambda file: file.write(data))
    write_json(folder / ABOUT, {**about, "format": FORMAT, SHA256: checksum})
    write_text(folder / CARD, model_card(about))

  if not folder.is_dir() or not any(folder.iterdir()):
    make_folder(folder, fill)
    return
  try:
    fill(folder)
  except OSError as error:
    raise UserError(f"{folder} can't be written: {error.strerror}.") from error


def check_needed(about: Mapping[str, Any], file: Path) -> None:
  """Raises a UserError for fields that lack, or have values of another type."""
  lacking = [
    name
    for name, kinds in NEEDED.items()
    if name not in about or not isinstance(about[name], kinds)
  ]
  if lacking:
    raise UserError(f"{file} has no usable {', '.join(lacking)}.")


def check_length(length: Any) -> None:
  """Raises a UserError for a max_length that no text fits.

  None, in an adapter that PEFT wrote, is for as long as the model has room.
  """
  is_number = isinstance(length, int) and not isinstance(length, bool)
  if length is not None and not (is_number and length >= SHORTEST):
    raise UserError(
      f"max_length is {length!r}; it must be a number of tokens, {SHORTEST} or"
      " more."
    )


def check_used(about: Mapping[str, Any], file: Path) -> None:
  """Raises a UserError for fields of adapter.json or merge.json that answering
  would use, and that have values of another type or a wrong max_length."""
  for name, kind in USED.items():
    if not isinstance(about.get(name), kind | None):
      raise UserError(f"{file} has no usable {name}: {about[name]!r}.")
  try:
    check_length(about.get("max_length"))
  except UserError as error:
    raise UserError(f"{file}: {error}") from error


def is_pefts(folder: Path) -> bool:
  """Whether a folder holds an adapter as PEFT writes it, and none of ours."""
  return (folder / PEFTS).is_file() and not (folder / ABOUT).exists()


def adapter_folder(name: str | Path) -> Path:
  """An adapter's folder here, ours or PEFT's; from the hub where it is there.

  Args:
    name: the folder, or that of its run, or its id on the hub: owner/name, or
      owner/name@revision for a branch, tag or commit.

  Raises:
    UserError: there is none.
  """
  folder = local_copy(name)
  if folder.is_dir():
    of_run = folder / "adapter"  # where a run's folder is named
    is_run = (of_run / ABOUT).is_file() and not (folder / ABOUT).exists()
    return of_run if is_run else folder
  hub_id = HUB_ID.fullmatch(str(name))
  if not hub_id:
    raise UserError(f"There is no adapter folder {folder}.")
  return snapshot(
    hub_id["name"],
    files=(ABOUT, TENSORS, CARD, PEFTS, PEFT_TENSORS),
    absent=f"There is no adapter folder {name} here, and the hub has no"
    f" adapter of that name (or not for you). {A_HUB_ID}",
    advice=A_HUB_ID,
    revision=hub_id["revision"],
  )


def load_adapter(name: str | Path) -> SavedAdapter:
  """Read an adapter; `classifier.restore_adapter` puts it on a base.

  Args:
    name: its folder, or its id on the hub, as `adapter_folder` takes it.

  Raises:
    UserError: a file that is missing, damaged or not of this adapter.
  """
  folder = adapter_folder(name)
  if is_pefts(folder):
    raise UserError(
      f"{folder} is an adapter in PEFT's format. `vera-jax peft import"
      f" --adapter={folder} --out=FOLDER` makes one of ours of it."
    )
  about = read_json(folder / ABOUT, hint=BOTH)
  if about.get("format") != FORMAT:
    raise UserError(
      f"{folder / ABOUT} has format {about.get('format')!r}; this vera_jax"
      f" reads format {FORMAT}. It was written by another one, or changed by"
      " hand."
    )
  check_needed(about, folder / ABOUT)
  check_used(about, folder / ABOUT)

  file = folder / TENSORS
  try:
    data = read_bytes(file, inside=folder, limit=DATA)
  except UserError as error:
    raise UserError(f"{error} {BOTH}") from error
  checksum = hashlib.sha256(data).hexdigest()
  if about.get(SHA256, checksum) != checksum:
    raise UserError(
      f"{file} is not the file that {ABOUT} was written with: its checksum"
      " differs. It is damaged or another adapter's; copy both again."
    )
  try:
    # sorted, for safetensors gives them in another order each time
    arrays = unstack_layers(dict(sorted(load(data).items())))
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  except (SafetensorError, ValueError, KeyError, OverflowError) as error:
    raise UserError(
      f"{file} is no whole safetensors file ({error}); copy it again."
    ) from error
  wrong = [
    name
    for name, value in arrays.items()
    if not np.issubdtype(value.dtype, np.floating)
    or not (abs(value) <= LARGEST).all()  # which NaN is not
  ]
  if wrong:
    raise UserError(
      f"{file}: {', '.join(wrong[:3])} holds values that are not finite"
      f" numbers, or are beyond {LARGEST:.0e}, where products overflow."
    )
  return SavedAdapter(about, arrays, folder)
