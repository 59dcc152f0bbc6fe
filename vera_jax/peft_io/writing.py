"""Our adapter folder -> PEFT's, in one of the forms of `forms/`."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vera_jax.adapters.card import CARD, peft_card, published
from vera_jax.adapters.counting import leaf_shapes
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import STORED, digest
from vera_jax.adapters.sites import matches
from vera_jax.errors import UserError
from vera_jax.files import check_free, make_folder, write_json, write_text
from vera_jax.hub import PACKAGE, is_here
from vera_jax.models.kinds import KINDS, kind_of
from vera_jax.peft_io.base import TASK_TYPES, module_list, open_base
from vera_jax.peft_io.forms import FORMS, HELD_BY, Ours
from vera_jax.peft_io.forms.lora import limited
from vera_jax.peft_io.fused import with_parts
from vera_jax.peft_io.settings import FILE
from vera_jax.peft_io.tensors import FILE as TENSORS
from vera_jax.peft_io.tensors import PREFIX, Tensors, write_tensors

BASE = "base_model_name_or_path"
WARNING = (
  "PEFT up to 0.20.0 ignores saved projections: it loads this adapter without"
  " an error and computes something else. Load it with PEFT 0.21.0 or newer,"
  " or export it with --as=lora, which every PEFT reads."
)


def export_adapter(
  folder: Path,
  out: Path,
  *,
  method: str | None = None,
  base: str | None = None,
  truncate: int | None = None,
  max_rank: int | None = None,
) -> tuple[list[str], float]:
  """Write our adapter as PEFT's: adapter_config.json and the tensors.

  Args:
    folder: of our adapter, of a method in `forms.HELD_BY`.
    out: the new folder.
    method: PEFT's, a name in `forms.FORMS`; unset: the first that `HELD_BY` has
      for the adapter's method.
    base: folder or hub id of the base, where it isn't the one that the adapter
      names. It must be the same weights.
    truncate, max_rank: as `forms.lora.limited` has them.

  Returns:
    Warnings for whoever loads it, and the share of a module's change of weights
    that is lost at most by `truncate`.

  Raises:
    UserError: naming what PEFT can't hold, is missing or doesn't fit.
  """
  out = check_free(out)
  saved = load_adapter(folder)
  about = saved.about
  own_method, settings = about["method"], about["settings"]
  if about.get("codes_digest"):  # a GGUF file's own codes everyone reads alike
    raise UserError(
      f"{folder} was trained on a base in {about['quantise']} codes, but PEFT"
      " would put it on the base's own weights, which are others. Merge it and"
      " use the checkpoint."
    )
  if own_method not in HELD_BY:
    raise UserError(
      f"{folder} holds method {own_method!r}; only {', '.join(HELD_BY)} are"
      " adapters that PEFT can hold. Merge it and use the checkpoint."
    )
  method = method or HELD_BY[own_method][0]
  if method not in HELD_BY[own_method]:
    raise UserError(
      f"A {own_method} adapter can't be written as PEFT's {method}; as"
      f" {' or '.join(HELD_BY[own_method])} it can."
    )
  form = FORMS[method]
  head = KINDS[kind_of(about, about["labels"])].head
  task_types = {kind: name for name, kind in TASK_TYPES.items()}
  if head not in task_types:
    raise UserError(
      f"{folder} has a head for {head}; only adapters that classify whole"
      " texts, or give their next word, are carried to PEFT. Merge it and use"
      " the checkpoint."
    )
  name = base or saved.base
  network = open_base(name, about, head=head)
  layers = with_parts(network.layers)
  adapter, targets = make_adapter(own_method, settings)

  # The tensors by Hugging Face's names of their modules.
  adapted: dict[str, Tensors] = {}
  if adapter.init is None:  # no layer has a leaf of its own
    adapted = {
      name: {}
      for name, layer in layers.items()
      if any(matches(pattern, layer.path) for pattern in targets)
    }
  tensors: Tensors = {}  # of the new file: first the head's
  saved_whole: set[str] = set()
  root: Tensors = {}
  stored: Tensors = {}
  for tensor, value in saved.tensors.items():
    module, _, leaf = tensor.rpartition(".")
    if module in ("", "projections"):
      (stored if module else root)[leaf] = value
      continue
    path = network.path(module)
    theirs, of_base = network.name(path), leaf in ("kernel", "scale", "bias")
    if theirs in layers and not of_base:
      adapted.setdefault(theirs, {})[leaf] = value
    elif path[0] in network.saved_modules and of_base:
      saved_whole.add(path[0])
      last = "bias" if leaf == "bias" else "weight"
      value = value.T  # torch has (out, in)
      tensors[f"{PREFIX}{theirs}.{last}"] = value
    else:
      raise UserError(
        f"{folder} holds {tensor!r}, for which PEFT has no place: of layers,"
        " linear ones are carried over. Merge it and use the checkpoint."
      )
  if not adapted:
    raise UserError(f"{folder} holds no adapted layer.")

  # They must be those of the method and the rank that adapter.json names.
  bare = adapter if adapter.links else adapter._replace(shared=None)
  for module, leaves in adapted.items():
    layer = layers[module]
    shapes = leaf_shapes(bare, layer.path, layer.target)
    need = {leaf: shape.shape for leaf, shape in shapes.items()}
    have = {leaf: value.shape for leaf, value in leaves.items()}
    if have != need:
      raise UserError(
        f"{module} has {have} in the adapter's file, but its adapter.json and"
        f" the base need {need}."
      )

  projections: dict[str, Any] = dict(stored)
  if adapter.shared is not None:
    if settings.get("init") != STORED:
      sites = {layers[name].path: layers[name].target for name in adapted}
      projections = jax.tree.map(np.asarray, adapter.shared(sites))
    if about["projection_digest"] != digest(projections):
      raise UserError(
        "The adapter's projections don't have the digest that its adapter.json"
        " names: it is damaged, or was made by another version."
      )
  ours = Ours(own_method, settings, adapter, adapted, layers, projections, root)
  exported = form.write(ours)
  if ours.parts:  # PEFT adapts fused layers as wholes
    if form.join is None or adapter.links:
      part = next(x for x in adapted if layers[x].target.columns)
      fused = layers[part].path[-2]
      raise UserError(
        f"{part} is a part of the fused layer {fused}, and PEFT's {own_method}"
        " adapts whole layers only. Merge the adapter, or train one with"
        f" targets=({fused!r},), the whole layer."
      )
    exported = form.join(ours, exported)
  lost = 0.0
  if method == "lora":
    exported, lost = limited(exported, truncate=truncate, max_rank=max_rank)
  elif truncate or max_rank:
    raise UserError(
      f"PEFT's {method} is not cut by rank: --truncate and --max_rank are for"
      " --as=lora."
    )
  tensors |= {theirs: exported.root[leaf] for theirs, leaf in form.root.items()}
  tensors |= {
    f"{PREFIX}{module}.{theirs}": leaves[leaf]
    for module, leaves in exported.leaves.items()
    for theirs, leaf in form.endings.items()
    if leaf in leaves
  }
  config = {
    "peft_type": method.upper(),
    # PEFT has no type of task for images, and needs none
    "task_type": None if network.reads_images else task_types[head],
    # PEFT knows no bases inside packages, but takes their folders
    BASE: (str(network.folder) if name.startswith(PACKAGE) else name),
    "inference_mode": True,
    "target_modules": module_list(exported.leaves, network.layers),
    "modules_to_save": sorted(saved_whole),
    "fan_in_fan_out": not network.classifier.family.names.transposed,
    **exported.fields,
  }

  def fill(folder: Path) -> None:
    write_tensors(folder / TENSORS, tensors, about=published(about))
    write_json(folder / FILE, config)
    write_text(folder / CARD, peft_card(about, str(config[BASE])))
    # safetensors gives its files to their owner alone
    shutil.copymode(folder / FILE, folder / TENSORS)

  make_folder(out, fill)
  drawn = (
    settings.get("init") == "peft" and not ours.parts
  )  # by every PEFT alike
  warnings = [WARNING] if method == "vera" and not drawn else []
  if is_here(str(config[BASE])):
    warnings.append(
      f"{FILE} names the base by a path of this machine, {config[BASE]}. For"
      f" other machines export it with --base=HUB_ID, or change {BASE}."
    )
  return warnings, lost
