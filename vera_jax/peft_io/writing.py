"""Our adapter folder -> PEFT's, as VeRA, LoRA or IA3.

A VeRA adapter is a LoRA adapter of the same rank, exactly: B' = diag(b) B,
A' = diag(d) A at scale 1, of A the columns and of B the rows that the layer
uses. So is DVoRA, for which PEFT has no method, LoRA with `use_dora`. The other
way round there is no such identity.
"""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from vera_jax.adapters.apply import leaf_shapes
from vera_jax.adapters.files import STORED, load_adapter
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.projections import digest, make_projections
from vera_jax.errors import UserError
from vera_jax.files import write_json
from vera_jax.hub import PACKAGE
from vera_jax.models.kinds import KINDS, kind_of
from vera_jax.peft_io.base import module_list, open_base
from vera_jax.peft_io.fused import join_lora, join_pair, join_vera, with_parts
from vera_jax.peft_io.settings import FILE, TASK_TYPES
from vera_jax.peft_io.tensors import FILE as TENSORS
from vera_jax.peft_io.tensors import (
  LEAVES,
  OURS,
  PAIR,
  PREFIX,
  Tensors,
  check_free,
  write_tensors,
)

WARNING = (
  "PEFT up to 0.20.0 ignores saved projections: it loads this adapter without"
  " an error and computes something else. Load it with PEFT 0.21.0 or newer,"
  " or export it with --as=lora, which every PEFT reads."
)


# PEFT's methods that can hold ours; the first one is taken if none is named.
HELD_BY = {
  "vera": ("vera", "lora"),
  "lora": ("lora",),
  "dora": ("lora",),
  "dvora": ("lora",),
  "ia3": ("ia3",),
}


def export_adapter(
  folder: Path, out: Path, *, method: str | None = None, base: str | None = None
) -> list[str]:
  """Write our adapter as PEFT's: adapter_config.json and the tensors.

  Args:
    folder: of our adapter, of a method in `HELD_BY`.
    out: the new folder.
    method: PEFT's, "vera", "lora" or "ia3"; unset: the adapter's own, or LoRA
      with `use_dora` for DoRA and DVoRA.
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
  if own not in HELD_BY:
    raise UserError(
      f"{folder} holds method {own!r}; only {', '.join(HELD_BY)} are adapters"
      " that PEFT can hold. Merge it and use the checkpoint."
    )
  method = method or HELD_BY[own][0]
  if method not in HELD_BY[own]:
    raise UserError(
      f"A {own} adapter can't be written as PEFT's {method}; as"
      f" {' or '.join(HELD_BY[own])} it can."
    )
  head = KINDS[kind_of(about, about["labels"])].head
  task_types = {kind: name for name, kind in TASK_TYPES.items()}
  if head not in task_types:
    raise UserError(
      f"{folder} has a head for {head}; only adapters that classify whole"
      " texts, or give their next word, are carried to PEFT. Merge it and use"
      " the checkpoint."
    )
  name = base or about["base"]
  network = open_base(name, about, head=head)
  layers = with_parts(network.layers)
  adapter, _ = make_adapter(own, given)
  if not adapter.links:  # then the leaves' shapes don't depend on A and B
    adapter = adapter._replace(shared=None)

  # The tensors by Hugging Face's names of their modules.
  adapted: dict[str, Tensors] = {}
  tensors: Tensors = {}  # of the new file: first the head's
  whole: set[str] = set()
  pair: dict[str, Any] = {}
  for tensor, value in saved.tensors.items():
    module, _, leaf = tensor.rpartition(".")
    path = network.path(module)
    theirs = network.name(path)
    if module == "projections":
      pair[leaf] = value
    elif theirs in layers and leaf in OURS:
      adapted.setdefault(theirs, {})[leaf] = value
    elif path[0] in network.whole and leaf in ("kernel", "scale", "bias"):
      whole.add(path[0])
      last = "bias" if leaf == "bias" else "weight"
      value = value.T  # torch has (out, in)
      tensors[f"{PREFIX}{theirs}.{last}"] = value
    else:
      raise UserError(
        f"{folder} holds {tensor!r}, for which PEFT has no place."
      )
  if not adapted:
    raise UserError(f"{folder} holds no adapted layer.")
  parts = [module for module in adapted if module not in network.layers]
  if parts and own not in ("vera", "lora"):
    path = layers[parts[0]].path
    raise UserError(
      f"{parts[0]} is a part of the fused layer {path[-2]}, and PEFT's {own}"
      " adapts whole layers only. Merge the adapter, or train one with"
      f" targets=({path[-2]!r},), the whole layer."
    )

  # They must be those of the method and the rank that adapter.json names.
  for module, leaves in adapted.items():
    layer = layers[module]
    shapes = leaf_shapes(adapter, layer.path, layer.target)
    need = {leaf: shape.shape for leaf, shape in shapes.items()}
    have = {leaf: value.shape for leaf, value in leaves.items()}
    if have != need:
      raise UserError(
        f"{module} has {have} in the adapter's file, but its adapter.json and"
        f" the base need {need}."
      )

  # The leaves and settings of PEFT's method.
  endings, fields = LEAVES[method], dict[str, Any]()
  if own == "ia3":
    scaled = [module for module in adapted if "ia3_in" in adapted[module]]
    fields["feedforward_modules"] = module_list(scaled, layers)
    for module, leaves in adapted.items():
      # PEFT has a row for inputs and a column for outputs, under one name
      (value,) = leaves.values()
      shape = (1, -1) if module in scaled else (-1, 1)
      adapted[module] = {"ia3_out": value.reshape(shape)}
  else:
    fields |= {"r": given["rank"], "bias": "none"}
  if own in ("dora", "dvora"):
    endings = LEAVES["dora"]
    fields["use_dora"] = True
  if own in ("lora", "dora"):
    fields["lora_alpha"] = given["alpha"]
  elif own != "ia3":
    shared = given["sharing"] == "shared"
    if method == "vera" and not shared:
      raise UserError(
        "Each layer of this adapter has projections of its own"
        " (sharing=unique), for which PEFT's VeRA has no place: --as=lora."
      )
    if given["init"] != STORED:
      pair = make_projections(
        {layers[module].path: layers[module].target for module in adapted},
        rank=given["rank"],
        seed=given["projection_seed"],
        init=given["init"],
        sharing=given["sharing"],
      )
    if about["projection_digest"] != digest(pair):
      raise UserError(
        "The adapter's projections don't have the digest that its adapter.json"
        " names: it is damaged, or was made by another version."
      )
    matrices = {path: np.asarray(x) for path, x in flatten_dict(pair).items()}
    for module, leaves in adapted.items():
      path, target = layers[module].path, layers[module].target
      # PEFT has both vectors; the one that was not trained is written out.
      d = np.full(given["rank"], given["d_init"], np.float32)
      b = np.ones(target.outputs, np.float32)
      d, b = leaves.get("vera_d", d), leaves.get("vera_b", b)
      if method == "vera":
        adapted[module] = {"vera_d": d, "vera_b": b}
      else:
        place = () if shared else path
        A = matrices[(*place, "A")][:, : target.inputs]
        B = matrices[(*place, "B")][: target.outputs]
        leaves |= {"lora_A": d[:, None] * A, "lora_B": b[:, None] * B}
    if method == "lora":
      fields["lora_alpha"] = given["rank"]  # scale 1
    else:
      pair = {letter: matrices[(letter,)] for letter in "AB"}
      is_peft = given["init"] == "peft" and not parts
      key = given["projection_seed"] if is_peft else 0
      fields |= {"d_initial": given["d_init"], "projection_prng_key": key}
      fields |= {"save_projection": True, "vera_dropout": 0.0}

  if parts:  # then PEFT has one adapter for all parts of a layer
    joined: dict[str, dict[str, Tensors]] = {}
    for module in sorted(adapted, key=lambda m: layers[m].target.columns or ()):
      is_layer = module in network.layers
      whose, part = (module, "") if is_layer else module.rsplit(".", 1)
      joined.setdefault(whose, {})[part] = adapted[module]
    most = max(len(own_parts) for own_parts in joined.values())
    fields["r"] = given["rank"] * most
    if method == "lora":
      fields["lora_alpha"] *= most  # the scale stays
      adapted = {
        whose: join_lora(layers[whose], own_parts, rank=fields["r"])
        for whose, own_parts in joined.items()
      }
    else:
      places = {
        tuple((part, layers[whose].parts.get(part)) for part in own_parts)
        for whose, own_parts in joined.items()
      }
      if len(places) > 1 or "" in dict(*places):
        raise UserError(
          "The adapter has parts of fused layers beside other layers, for which"
          " PEFT's VeRA has no common A and B: --as=lora."
        )
      pair = next(
        join_pair(layers[whose], own_parts, pair)
        for whose, own_parts in joined.items()
      )
      adapted = {
        whose: join_vera(layers[whose], own_parts)
        for whose, own_parts in joined.items()
      }
  if method == "vera":
    tensors |= {name: pair[letter] for name, letter in PAIR.items()}
  tensors |= {
    f"{PREFIX}{module}.{theirs}": leaves[ours]
    for module, leaves in adapted.items()
    for theirs, ours in endings.items()
  }
  config = {
    "peft_type": method.upper(),
    # PEFT has no type of task for images, and needs none
    "task_type": None if network.reads_images else task_types[head],
    # PEFT knows no bases inside packages, but takes their folders
    "base_model_name_or_path": (
      str(network.folder) if name.startswith(PACKAGE) else name
    ),
    "inference_mode": True,
    "target_modules": module_list(adapted, network.layers),
    "modules_to_save": sorted(whole),
    "fan_in_fan_out": not network.classifier.family.names.transposed,
    **fields,
  }
  out.mkdir(parents=True, exist_ok=True)
  write_tensors(out / TENSORS, tensors, about=about)
  write_json(out / FILE, config)
  drawn = given.get("init") == "peft" and not parts  # by every PEFT alike
  return [WARNING] if method == "vera" and not drawn else []
