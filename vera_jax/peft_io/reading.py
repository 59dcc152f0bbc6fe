"""PEFT's adapter folder -> ours.

The names in PEFT's file say which layers are adapted; its config says which
should be, and the two must agree. Layers of a kind that PEFT left out
(`layers_to_transform`) get the adapter that adds nothing: b, or LoRA's B, is 0.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from vera_jax.adapters.files import save_adapter
from vera_jax.adapters.projections import PRNG
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.hub import PACKAGE, resolve
from vera_jax.models.bert import BertConfig
from vera_jax.models.family import family_of, load_config
from vera_jax.models.hf_weights import fingerprint, module_path
from vera_jax.peft_io.about import describe, our_settings
from vera_jax.peft_io.config import PeftSettings, is_target, read_config
from vera_jax.peft_io.files import (
  LEAVES,
  PAIR,
  PEFT_FILE,
  PREFIX,
  check_free,
  read_tensors,
)
from vera_jax.peft_io.head import (
  HEADS,
  Leaves,
  check_head,
  head_of_base,
  num_labels,
)
from vera_jax.peft_io.layers import Layer, linear_layers
from vera_jax.peft_io.origin import Origin, check_base, find_origin

HEAD = {"weight": "kernel", "bias": "bias"}


class Parts(NamedTuple):
  """A file's tensors by what they are: {module: {leaf: values}} of the adapted
  layers, the saved pair, the head's leaves by path."""

  adapted: dict[str, dict[str, np.ndarray]]
  pair: dict[str, np.ndarray]
  head: Leaves


def import_adapter(
  folder: Path, out: Path, *, base: str | None = None, task: str | None = None
) -> dict[str, Any]:
  """Write a PEFT adapter (VeRA or LoRA, on BERT or RoBERTa) as ours.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    out: the new folder.
    base: folder or hub id of the base; unset: the one that the config names.
    task: a GLUE task, for the names of labels and metric.

  Returns:
    What adapter.json holds.

  Raises:
    UserError: naming what can't be carried, is missing or doesn't fit.
  """
  check_free(out)
  settings = read_config(folder)
  tensors, carried = read_tensors(folder / PEFT_FILE)
  name = base or settings.base
  ours = str(carried.get("base"))
  if base is None and ours.startswith(PACKAGE):
    name = ours  # the export wrote the folder, which is one machine's own
  if name is None:
    raise UserError(
      f"{folder} names no base model, or a revision of one: say --base=FOLDER."
    )
  base_folder = resolve(name)
  check_base(carried, base_folder)
  config = _base_config(base_folder)
  layers = linear_layers(config)
  parts = _sort(tensors, settings.method, layers, config.model_type)
  _check_targets(settings, parts.adapted, layers)
  adapter = _adapter_leaves(settings, parts.adapted, layers)
  head = parts.head or head_of_base(base_folder, config)
  shapes = check_head(head, config)
  labels = num_labels(head)
  about = {
    **describe(carried, task=task, num_labels=labels, base=base_folder),
    "base": name,
    "base_fingerprint": fingerprint(base_folder),
    "parameters": {
      "adapter": sum(x.size for x in adapter.values()),
      "head": sum(x.size for x in head.values()),
      "frozen": sum(x.size for p, x in shapes.items() if p not in head),
    },
  }
  said, origin = _method(settings, parts, layers, carried)
  kept = origin.pair.items() if origin else ()
  stored = {("projections", letter): matrix for letter, matrix in kept}
  save_adapter(
    out, unflatten_dict({**adapter, **head, **stored}), about={**about, **said}
  )
  return {**about, **said}


def _method(
  settings: PeftSettings,
  parts: Parts,
  layers: Mapping[str, Layer],
  carried: Mapping[str, Any],
) -> tuple[dict[str, Any], Origin | None]:
  """What adapter.json says of the method, and where its projections are from.

  `carried` is the adapter.json of our own export, {} in PEFT's own files.
  """
  ours = carried.get("settings")
  if carried.get("method") != settings.method or not isinstance(ours, dict):
    ours = {}
  origin = None
  if settings.method == "vera":
    targets = [layers[name].target for name in parts.adapted]
    origin = find_origin(
      settings,
      parts.pair,
      inputs=max(target.inputs for target in targets),
      outputs=max(target.outputs for target in targets),
      ours=ours,
    )
  said = {
    "method": settings.method,
    "projection_digest": origin.digest if origin else None,
    "projection_prng": PRNG,
    "settings": our_settings(
      settings,
      origin,
      kinds={layers[name].kind for name in parts.adapted},
      there={layer.kind for layer in layers.values()},
      ours=ours,
    ),
  }
  return said, origin


def _base_config(folder: Path) -> BertConfig:
  if read_json(folder / "config.json").get("quantization_config"):
    raise UserError(
      f"{folder} is quantised (quantization_config in its config.json); give"
      " the unquantised base by --base=FOLDER."
    )
  return load_config(folder)


def _sort(
  tensors: Mapping[str, np.ndarray],
  method: str,
  layers: Collection[str],
  model_type: str,
) -> Parts:
  parts = Parts({}, {}, {})
  names = family_of({"model_type": model_type}).names
  for name, value in tensors.items():
    inner = name.removeprefix(PREFIX)
    ending = next((e for e in LEAVES[method] if inner.endswith(f".{e}")), None)
    module, _, last = inner.rpartition(".")
    path = module_path(module, names)
    if method == "vera" and name in PAIR:
      parts.pair[PAIR[name]] = value
    elif ending and inner.removesuffix(f".{ending}") in layers:
      leaves = parts.adapted.setdefault(inner.removesuffix(f".{ending}"), {})
      leaves[LEAVES[method][ending]] = value
    elif path[0] in HEADS and last in HEAD:
      parts.head[(*path, HEAD[last])] = value.T if last == "weight" else value
    else:
      raise UserError(
        f"The adapter's file holds {name!r}, which has no place here: only"
        f" {' and '.join(LEAVES[method])} of a classifier's linear layers, and"
        f" whole {' and '.join(HEADS)} modules (modules_to_save), can be"
        " carried."
      )
  return parts


def _check_targets(
  settings: PeftSettings, found: Collection[str], layers: Collection[str]
) -> None:
  if not found:
    raise UserError("The adapter's file holds no adapted layer.")
  whole = [name for name in found if name.startswith(HEADS)]
  if whole:
    raise UserError(
      f"{whole[0]} is part of the head, which is trained whole here; name"
      " classifier in modules_to_save instead of adapting it."
    )
  for name in layers:
    expected = is_target(settings, name)
    if expected is not None and expected != (name in found):
      raise UserError(
        f"target_modules {'names' if expected else 'leaves out'} {name}, but"
        f" the adapter's file has {'no' if expected else 'a'} tensor for it:"
        " the two files don't belong together, one is cut off, or the base is"
        " another."
      )


def _shapes(settings: PeftSettings, layer: Layer) -> dict[str, tuple[int, ...]]:
  rank, (inputs, outputs) = settings.rank, layer.target[:2]
  if settings.method == "vera":
    return {"vera_d": (rank,), "vera_b": (outputs,)}
  return {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}


def _adapter_leaves(
  settings: PeftSettings,
  adapted: Mapping[str, Mapping[str, np.ndarray]],
  layers: Mapping[str, Layer],
) -> Leaves:
  kinds = {layers[name].kind for name in adapted}
  leaves: Leaves = {}
  for name, layer in layers.items():
    for leaf, shape in _shapes(settings, layer).items():
      if layer.kind not in kinds:
        continue
      value = adapted.get(name, {}).get(leaf)
      if value is None and name in adapted:
        raise UserError(f"The adapter's file lacks {leaf} of {name}.")
      if value is None:
        start = settings.d_init if leaf == "vera_d" else 0
        value = np.full(shape, start, np.float32)
      if value.shape != shape:
        raise UserError(
          f"{leaf} of {name} has shape {value.shape}; the base and r ="
          f" {settings.rank} need {shape}. Is it the right base?"
        )
      leaves[(*layer.path, leaf)] = value
  return leaves
