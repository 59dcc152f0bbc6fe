"""Our adapter folder -> PEFT's, as VeRA or as LoRA.

A VeRA adapter is a LoRA adapter of the same rank, exactly: B' = diag(b) B,
A' = diag(d) A at scale 1, of A the columns and of B the rows that the layer
uses. The other way round there is no such identity.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from vera_jax.adapters.apply import leaf_shapes
from vera_jax.adapters.files import STORED, SavedAdapter, load_adapter
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import digest, make_projections
from vera_jax.errors import UserError
from vera_jax.files import write_json
from vera_jax.hub import PACKAGE, resolve
from vera_jax.models.family import family_of, load_config
from vera_jax.models.hf_weights import (
  module_name,
  module_path,
)
from vera_jax.peft_io.config import FILE
from vera_jax.peft_io.files import (
  LEAVES,
  OURS,
  PEFT_FILE,
  PREFIX,
  SHA256,
  check_free,
  checksum,
)
from vera_jax.peft_io.head import HEADS
from vera_jax.peft_io.layers import (
  Layer,
  linear_layers,
  module_list,
)
from vera_jax.peft_io.origin import check_base

METHODS = ("vera", "lora")
WARNING = (
  "PEFT up to 0.20.0 ignores saved projections: it loads this adapter without"
  " an error and computes something else. Load it with PEFT 0.21.0 or newer,"
  " or export it with --as=lora, which every PEFT reads."
)
Tensors = dict[str, np.ndarray]
THEIRS = {
  ours: theirs for names in LEAVES.values() for theirs, ours in names.items()
}


class Ours(NamedTuple):
  """Our folder: adapter.json, the leaves of each adapted layer and the head's
  by Hugging Face's names, and the projections where they were stored."""

  about: dict[str, Any]
  adapted: dict[str, Tensors]
  head: Tensors
  stored: Tensors


class Converted(NamedTuple):
  """What PEFT is to get: `adapted` as in `Ours`, the pair to save, and the
  config's fields of the method."""

  method: str
  adapted: dict[str, Tensors]
  pair: Tensors
  fields: dict[str, Any]


def export_adapter(
  folder: Path, out: Path, *, method: str | None = None, base: str | None = None
) -> list[str]:
  """Write our adapter as PEFT's: adapter_config.json and the tensors.

  Args:
    folder: of our adapter, VeRA or LoRA.
    out: the new folder.
    method: "vera" or "lora"; unset: the adapter's own.
    base: folder or hub id of the base, where it isn't the one that the adapter
      names. It must be the same weights.

  Returns:
    Warnings for whoever loads it.

  Raises:
    UserError: naming what PEFT can't hold, is missing or doesn't fit.
  """
  check_free(out)
  saved = load_adapter(folder)
  about = saved.about
  own, given = about["method"], about["settings"]
  if own not in METHODS:
    raise UserError(
      f"{folder} holds method {own!r}; only {' and '.join(METHODS)} are"
      " adapters that PEFT can hold. Merge it and use the checkpoint."
    )
  name = base or about["base"]
  base_folder = resolve(name)
  check_base(about, base_folder)
  config = load_config(base_folder)
  layers = linear_layers(config)
  ours = _sort(saved, layers, config.model_type)
  _check_leaves(ours, layers)
  converted = _convert(ours, method or own, layers)
  place = str(base_folder) if name.startswith(PACKAGE) else name
  _write(out, ours, converted, base=place, layers=layers)
  stored = converted.method == "vera" and given.get("init") != "peft"
  return [WARNING] if stored else []


def _convert(ours: Ours, method: str, layers: Mapping[str, Layer]) -> Converted:
  own, given = ours.about["method"], ours.about["settings"]
  try:
    if method == own == "vera":
      adapted, pair = _as_vera(ours, layers)
      return Converted(method, adapted, pair, _vera_fields(given))
    if method == "lora":
      alpha = given["alpha"] if own == "lora" else given["rank"]
      adapted = ours.adapted if own == "lora" else _as_lora(ours, layers)
      fields = {"r": given["rank"], "lora_alpha": alpha}
      return Converted(method, adapted, {}, fields)
  except KeyError as error:
    raise UserError(
      f"The adapter's adapter.json or its tensors lack {error}."
    ) from error
  raise UserError(
    "A LoRA adapter can't be written as VeRA: its matrices are its own."
  )


def _write(
  out: Path,
  ours: Ours,
  converted: Converted,
  *,
  base: str,
  layers: Mapping[str, Layer],
) -> None:
  adapted = converted.adapted
  tensors = {
    f"{PREFIX}{module}.{THEIRS[leaf]}": value
    for module, leaves in adapted.items()
    for leaf, value in leaves.items()
  }
  tensors |= {f"{PREFIX}{name}": value for name, value in ours.head.items()}
  tensors |= {f"base_model.vera_{k}": x for k, x in converted.pair.items()}
  whole = [head for head in HEADS if any(head in name for name in ours.head)]
  config = {
    "peft_type": converted.method.upper(),
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": base,
    "inference_mode": True,
    "target_modules": module_list(adapted, layers),
    "modules_to_save": whole,
    "bias": "none",
    "fan_in_fan_out": False,
    **converted.fields,
  }
  out.mkdir(parents=True, exist_ok=True)
  save_file(
    {name: np.ascontiguousarray(value) for name, value in tensors.items()},
    out / PEFT_FILE,
    metadata={
      "format": "pt",
      OURS: json.dumps(ours.about),
      SHA256: checksum(tensors),
    },
  )
  write_json(out / FILE, config)


def _check_leaves(ours: Ours, layers: Mapping[str, Layer]) -> None:
  """Names and shapes are those of method and rank."""
  adapter, _ = make_adapter(ours.about["method"], ours.about["settings"])
  for name, leaves in ours.adapted.items():
    layer = layers[name]
    need = {
      leaf: shape.shape
      for leaf, shape in leaf_shapes(adapter, layer.path, layer.target).items()
    }
    have = {leaf: value.shape for leaf, value in leaves.items()}
    if have != need:
      raise UserError(
        f"{name} has {have} in the adapter's file, but its adapter.json and"
        f" the base need {need}."
      )


def _sort(
  saved: SavedAdapter, layers: Mapping[str, Layer], model_type: str
) -> Ours:
  names = family_of({"model_type": model_type}).names
  ours = Ours(saved.about, {}, {}, {})
  for name, value in saved.tensors.items():
    module, _, leaf = name.rpartition(".")
    path = module_path(module, names)
    theirs = module_name(path, model_type=model_type)
    if module == "projections":
      ours.stored[leaf] = value
    elif theirs in layers and leaf.startswith(METHODS):
      ours.adapted.setdefault(theirs, {})[leaf] = value
    elif path[0] in HEADS and leaf == "kernel":
      ours.head[f"{theirs}.weight"] = value.T
    elif path[0] in HEADS and leaf == "bias":
      ours.head[f"{theirs}.bias"] = value
    else:
      raise UserError(
        f"{saved.folder} holds {name!r}, for which PEFT has no place."
      )
  if not ours.adapted:
    raise UserError(f"{saved.folder} holds no adapted layer.")
  return ours


def _vera_fields(given: Mapping[str, Any]) -> dict[str, Any]:
  key = given["projection_seed"] if given["init"] == "peft" else 0
  return {
    "r": given["rank"],
    "d_initial": given["d_init"],
    "projection_prng_key": key,
    "save_projection": True,
    "vera_dropout": 0.0,
  }


def _vectors(ours: Ours, layer: Layer, leaves: Tensors) -> Tensors:
  """d and b, with the one that was not trained written out."""
  given = ours.about["settings"]
  d = np.full(given["rank"], given["d_init"], np.float32)
  b = np.ones(layer.target.outputs, np.float32)
  return {"vera_d": d, "vera_b": b, **leaves}


def _as_vera(
  ours: Ours, layers: Mapping[str, Layer]
) -> tuple[dict[str, Tensors], Tensors]:
  if ours.about["settings"]["sharing"] != "shared":
    raise UserError(
      "Each layer of this adapter has projections of its own"
      " (sharing=unique), for which PEFT's VeRA has no place: --as=lora."
    )
  adapted = {
    name: _vectors(ours, layers[name], leaves)
    for name, leaves in ours.adapted.items()
  }
  matrices = _projections(ours, layers)
  return adapted, {k: matrices[(k,)] for k in "AB"}


def _as_lora(ours: Ours, layers: Mapping[str, Layer]) -> dict[str, Tensors]:
  matrices = _projections(ours, layers)
  adapted = {}
  for name, leaves in ours.adapted.items():
    path, target = layers[name].path, layers[name].target
    own = path if (*path, "A") in matrices else ()
    A, B = matrices[(*own, "A")], matrices[(*own, "B")]
    vectors = _vectors(ours, layers[name], leaves)
    adapted[name] = {
      "lora_A": vectors["vera_d"][:, None] * A[:, : target.inputs],
      "lora_B": vectors["vera_b"][:, None] * B[: target.outputs],
    }
  return adapted


def _projections(
  ours: Ours, layers: Mapping[str, Layer]
) -> dict[TreePath, np.ndarray]:
  """A and B by path in a looped tree, or at its root; the digest is checked."""
  given = ours.about["settings"]
  adapted = [layers[name] for name in ours.adapted]
  tree: dict[str, Any] = dict(ours.stored)
  if given["init"] != STORED:
    tree = make_projections(
      {layer.path: layer.target for layer in adapted},
      rank=given["rank"],
      seed=given["projection_seed"],
      init=given["init"],
      sharing=given["sharing"],
    )
  if ours.about["projection_digest"] != digest(tree):
    raise UserError(
      "The adapter's projections don't have the digest that its adapter.json"
      " names: it is damaged, or was made by another version."
    )
  return {p: np.asarray(x) for p, x in flatten_dict(tree).items()}
