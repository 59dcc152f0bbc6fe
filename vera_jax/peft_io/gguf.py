"""llama.cpp's file of a LoRA adapter, written and read.

Either way goes through PEFT's LoRA folder (`forms/lora.py`), whose matrices the
file has under llama.cpp's names, as NAME.lora_a (r, in) and NAME.lora_b
(out, r). llama.cpp multiplies their product with alpha / r, r of each module by
itself: so a module has no more rows than it needs, and alpha is the largest r.
In files of a Llama the rows of q and k are in pairs (`gguf_folder.to_pairs`),
and so are those of their B.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp
"""

import json
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.lora import SCALES
from vera_jax.errors import UserError
from vera_jax.files import parse_json, read_json, write_json
from vera_jax.models.family import config_of, read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_file import (
  Written,
  read_gguf,
  refuse_there,
  write_gguf,
)
from vera_jax.models.gguf_folder import (
  architecture_for,
  from_pairs,
  interleaved_heads,
  module_in_file,
  module_of,
  to_pairs,
)
from vera_jax.peft_io.forms import HELD_BY
from vera_jax.peft_io.reading import import_adapter
from vera_jax.peft_io.settings import FILE as SETTINGS
from vera_jax.peft_io.tensors import FILE, PREFIX, read_tensors, write_tensors
from vera_jax.peft_io.writing import BASE, export_adapter
from vera_jax.places import local_copy, place

FORMATS = ("F32", "F16", "BF16")
ABOUT = "vera_jax.adapter"  # the key of our adapter.json


def export_gguf_adapter(
  folder: Path,
  file: str | Path,
  *,
  base: str | None = None,
  format: str = "F32",
  truncate: int | None = None,
  max_rank: int | None = None,
) -> dict[str, Any]:
  """Write our adapter as a file that llama.cpp puts on its base.

  Args:
    folder: of an adapter of a decoder that is a LoRA, exactly.
    file: the new file.
    base: as for `export_adapter`.
    format: of the matrices, a name in `FORMATS`.
    truncate, max_rank: as for `export_adapter`.

  Returns:
    The largest "rank", the number of "modules", and of a module's change of
    weights the share that is "lost" at most.

  Raises:
    UserError: naming what llama.cpp has no place for, or that the rank is too
      large.
  """
  file = place(file)
  refuse_there(file)
  method = load_adapter(folder).about["method"]
  if "lora" not in HELD_BY.get(method, ()):
    raise UserError(
      f"{folder} holds method {method!r}, which is no LoRA, and llama.cpp has"
      " no other adapters. Merge it: --as=merged."
    )
  with TemporaryDirectory() as temporary:
    peft = Path(temporary) / "peft"
    _, lost = export_adapter(
      folder,
      peft,
      method="lora",
      base=base,
      truncate=truncate,
      max_rank=max_rank,
    )
    fields = read_json(peft / SETTINGS)
    tensors, about = read_tensors(peft / FILE)
  if fields.get("use_dora") or fields["task_type"] != "CAUSAL_LM":
    what = "has magnitudes (DoRA)" if fields.get("use_dora") else "has a head"
    raise UserError(
      f"{folder} {what}, for which llama.cpp's adapters have no place. A"
      " decoder can be merged: --as=merged."
    )
  model = resolve(fields[BASE])
  known = read_fields(model)
  name, architecture = architecture_for(known.get("model_type"), model)
  sizes = vars(config_of(known))
  leaves: dict[str, dict[str, np.ndarray]] = {}
  for key, value in tensors.items():
    module, _, matrix = key.removeprefix(PREFIX).partition(".lora_")
    leaves.setdefault(module, {})[f"lora_{matrix[0]}"] = value
  for pair in leaves.values():  # PEFT's one r is more than some modules need
    used = np.any(pair["lora_A"], axis=1) & np.any(pair["lora_B"], axis=0)
    used = used if used.any() else np.arange(len(used)) == 0
    pair |= {"lora_A": pair["lora_A"][used], "lora_B": pair["lora_B"][:, used]}
  rank = max(len(pair["lora_A"]) for pair in leaves.values())
  scaling = SCALES["root" if fields.get("use_rslora") else "rank"]
  scale = fields["lora_alpha"] / scaling(fields["r"])
  written: dict[str, Written] = {}
  for module, pair in leaves.items():
    if not (ours := module_in_file(module, architecture)):
      raise UserError(f"A {name!r} has no place in GGUF for {module}.")
    A, B = pair["lora_A"], pair["lora_B"]
    B = B * np.float32(scale * len(A) / rank)
    heads = interleaved_heads(f"{ours}.weight", architecture, sizes)
    B = B if heads is None else to_pairs(B, heads=heads)
    for letter, value in (("a", A), ("b", B)):
      written[f"{ours}.weight.lora_{letter}"] = Written(
        format, value.shape, partial(np.asarray, value)
      )
  metadata = {
    "general.architecture": name,
    "general.type": "adapter",
    "general.name": file.stem,
    "adapter.type": "lora",
    "adapter.lora.alpha": float(rank),
    ABOUT: json.dumps(about),
  }
  file.parent.mkdir(parents=True, exist_ok=True)
  write_gguf(file, metadata, written)
  return {"rank": rank, "modules": len(leaves), "lost": lost}


def import_gguf_adapter(
  file: str | Path, out: Path, *, base: str
) -> dict[str, Any]:
  """Write a LoRA adapter of llama.cpp's as ours.

  Args:
    file: of the adapter.
    out: the new folder.
    base: folder or hub id of the base, which the file doesn't name.

  Returns:
    What adapter.json holds.

  Raises:
    UserError: it is no such file, or not of this base.
  """
  gguf = read_gguf(local_copy(file))
  metadata = gguf.metadata
  kind = [metadata.get(f"{x}.type") for x in ("general", "adapter")]
  if kind != ["adapter", "lora"]:
    raise UserError(
      f"{file} is no LoRA adapter: its general.type and adapter.type are"
      f" {kind[0]!r} and {kind[1]!r}."
    )
  about = {}
  if isinstance(text := metadata.get(ABOUT), str):
    try:
      about = parse_json(text)
    except ValueError:
      pass
  about = about if isinstance(about, dict) else {}
  fields = read_fields(resolve(base))
  name, architecture = architecture_for(fields.get("model_type"), base)
  if metadata.get("general.architecture") != name:
    raise UserError(
      f"{file} is of a {metadata.get('general.architecture')!r}, and {base} is"
      f" a {name!r}: it is the adapter of another base."
    )
  sizes, alpha = vars(config_of(fields)), metadata.get("adapter.lora.alpha", 0)
  if not isinstance(alpha, int | float) or not math.isfinite(alpha):
    raise UserError(f"{file}: its adapter.lora.alpha is {alpha!r}.")
  pairs: dict[str, dict[str, np.ndarray]] = {}
  for key in gguf.tensors:
    ours, _, letter = key.partition(".weight.lora_")
    theirs = module_of(ours, architecture)
    if not theirs or letter not in ("a", "b"):
      raise UserError(f"{file}: its tensor {key!r} is no matrix of a {name!r}.")
    value = np.asarray(gguf.values(key), np.float32)
    heads = interleaved_heads(f"{ours}.weight", architecture, sizes)
    if letter == "b" and heads is not None and len(value) % (2 * heads) == 0:
      value = from_pairs(value, heads=heads)
    pairs.setdefault(theirs, {})[letter.upper()] = value
  for module, pair in pairs.items():
    if [x.ndim for x in pair.values()] != [2, 2] or (
      len(pair["A"]) != pair["B"].shape[1]
    ):
      raise UserError(f"{file}: of {module} it has no A and B of one rank.")
  rank = max((len(pair["A"]) for pair in pairs.values()), default=0)
  tensors = {}
  for module, pair in pairs.items():
    more = rank - len(pair["A"])  # PEFT has one r for all
    B = pair["B"] * np.float32(alpha / len(pair["A"]) if alpha else 1)
    key = f"{PREFIX}{module}.lora_"
    tensors[f"{key}A.weight"] = np.pad(pair["A"], [(0, more), (0, 0)])
    tensors[f"{key}B.weight"] = np.pad(B, [(0, 0), (0, more)])
  config = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", BASE: base},
    **{"r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)},
  }
  with TemporaryDirectory() as temporary:
    write_json(Path(temporary) / SETTINGS, config)
    write_tensors(Path(temporary) / FILE, tensors, about=about)
    return import_adapter(Path(temporary), out, base=base)
