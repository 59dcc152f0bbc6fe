"""A decoder's folder in Hugging Face's layout as one GGUF file.

Weights come out as F16 or Q8_0. Four bits are refused for a merged model: the
change that an adapter makes is smaller than their steps, so that rounding the
merged weights again takes most of it back (docs/gguf.md has the measurements).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vera_jax.errors import UserError
from vera_jax.models.family import read_fields
from vera_jax.models.gguf import FORMATS, Written, write_gguf
from vera_jax.models.gguf_folder import (
  ARCHITECTURES,
  FREQUENCIES,
  LAYER,
  LINK,
  MISTRAL,
  Architecture,
  interleaved_heads,
  is_transposed,
  llama3_factors,
  open_tensors,
  to_pairs,
)
from vera_jax.models.gguf_tokenizer import tokenizer_metadata
from vera_jax.models.hf_weights import tensor_files

KINDS = {"gguf-f16": ("F16", 1), "gguf-q8_0": ("Q8_0", 7)}  # and file_type
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
FOUR_BITS = ("q2", "q3", "q4", "q5", "iq")


def check_kind(kind: str) -> None:
  """Refuses what is not written here.

  Raises:
    UserError: says why a merged model is not written in four bits.
  """
  if kind in KINDS:
    return
  if kind.removeprefix("gguf-").startswith(FOUR_BITS):
    raise UserError(
      f"A merged model is not written as {kind}: an adapter changes weights by"
      " less than such a format's steps, so rounding them would undo most of"
      " what was learned (of a change of 1 %, under a tenth is left in Q4_1)."
      f" Choose {' or '.join(KINDS)}, or keep the adapter beside its base."
    )
  raise UserError(f"There is no format {kind!r}; choose {', '.join(KINDS)}.")


def check_model(folder: Path) -> None:
  """Raises a UserError unless GGUF has the folder's architecture."""
  _architecture(read_fields(folder), folder)


def refuse_there(file: Path) -> None:
  """Raises a UserError if a file is there."""
  if file.exists():
    raise UserError(f"{file} is there already; choose another --out.")


def write_gguf_of(
  folder: str | Path, file: str | Path, *, kind: str
) -> dict[str, int]:
  """Write a folder's model as a GGUF file, one tensor in memory at a time.

  Matrices are stored as `kind` says, or as F16 where their rows are no whole
  blocks of 32; vectors as float32, as llama.cpp wants them.

  Args:
    folder: with config.json, safetensors (or a GGUF's link), tokenizer.json.
    file: to write; must not be there.
    kind: a name in `KINDS`.

  Returns:
    The number of tensors of each format.

  Raises:
    UserError: the model, its tokenizer or its numbers don't go into GGUF, or
      the file is there already.
  """
  check_kind(kind)
  folder, file = Path(folder).expanduser(), Path(file).expanduser()
  refuse_there(file)
  fields = read_fields(folder)
  prefix, architecture = _architecture(fields, folder)
  if fields.get("num_key_value_heads") is None:
    fields["num_key_value_heads"] = fields.get("num_attention_heads")
  format, file_type = KINDS[kind]
  names = {theirs: ours for ours, theirs in architecture.modules.items()}
  base = architecture.modules["token_embd"].split(".")[0]
  tied = fields.get("tie_word_embeddings", prefix == "gpt2")
  tensors: dict[str, Written] = {}
  with ExitStack() as stack:
    for source in tensor_files(folder):
      try:
        opened: Any = (
          open_tensors(source)
          if source.name == LINK
          else stack.enter_context(safe_open(source, framework="numpy"))
        )
      except (SafetensorError, OSError) as error:
        raise UserError(f"{source} can't be read: {error}.") from error
      for name in opened.keys():
        layer = LAYER.search(f".{name}")
        module, _, leaf = LAYER.sub("{}", f".{name}", 1)[1:].rpartition(".")
        if name.endswith(BUFFERS) or (tied and module == "lm_head"):
          continue
        # a file of the network without its head has no first word in its names
        known = names.get(module, names.get(f"{base}.{module}"))
        if known is None or leaf not in ("weight", "bias"):
          raise UserError(
            f"{folder} can't be written as GGUF: there is no place in a"
            f" {prefix!r} for its tensor {name!r}."
          )
        ours = known.format(layer[0] if layer else "") + f".{leaf}"
        turned = is_transposed(ours, architecture)
        shape = tuple(opened.get_slice(name).get_shape())
        shape = shape[::-1] if turned else shape
        stored = format if len(shape) > 1 else "F32"
        if shape[-1] % FORMATS[stored].weights:
          stored = "F16"
        tensors[ours] = Written(
          stored,
          shape,
          partial(
            _values,
            opened,
            name,
            turned=turned,
            heads=interleaved_heads(ours, architecture, fields),
          ),
        )
    if not tied and "output.weight" not in tensors:
      raise UserError(f"{folder} lacks its head, the tensor 'lm_head.weight'.")
    if "token_embd.weight" not in tensors:
      raise UserError(f"{folder} has no embedding, so it is no whole decoder.")
    rows = tensors["token_embd.weight"].shape[0]
    metadata: dict[str, Any] = {
      "general.architecture": prefix,
      "general.type": "model",
      "general.name": file.stem,
      "general.file_type": file_type,
      "general.quantization_version": 2,
      f"{prefix}.vocab_size": rows,
      **_sizes(prefix, architecture, fields, folder),
    }
    if factors := _scaling(prefix, fields, metadata, folder):
      tensors[FREQUENCIES] = factors
    metadata |= tokenizer_metadata(folder, rows=rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
      write_gguf(file, metadata, tensors)
    except OSError as error:
      raise UserError(f"{file} can't be written: {error}") from error
  formats = [tensor.format for tensor in tensors.values()]
  return {name: formats.count(name) for name in FORMATS if name in formats}


def _architecture(
  fields: Mapping[str, Any], folder: Path
) -> tuple[str, Architecture]:
  kinds = {
    architecture.model_type: (name, architecture)
    for name, architecture in ARCHITECTURES.items()
  } | {MISTRAL.model_type: ("llama", MISTRAL)}
  model_type = fields.get("model_type")
  if model_type not in kinds:
    raise UserError(
      f"{folder} is a {model_type!r}; GGUF files are written here of"
      f" {', '.join(kinds)}."
    )
  _, architecture = kinds[model_type]
  rope = fields.get("rope_parameters") or {}
  plain = {**architecture.always, "partial_rotary_factor": 1}
  for name, value in plain.items():
    found = fields.get(name, rope.get(name))
    if found is not None and found != value:
      raise UserError(
        f"{folder} can't be written as GGUF: its {name} is {found!r}, for which"
        f" the header of a {model_type} has no place."
      )
  return kinds[model_type]


def _values(
  opened: Any, name: str, *, turned: bool, heads: int | None
) -> np.ndarray:
  values = opened.get_tensor(name)
  if turned:
    return values.T
  return values if heads is None else to_pairs(values, heads=heads)


def _sizes(
  prefix: str,
  architecture: Architecture,
  fields: Mapping[str, Any],
  folder: Path,
) -> dict[str, Any]:
  """The header's numbers of an architecture."""
  heads = fields.get("num_attention_heads")
  sizes: dict[str, Any] = {}
  for field, key in architecture.fields.items():
    sizes[f"{prefix}.{key}"] = fields.get(field)
  field, key = architecture.epsilon
  sizes[f"{prefix}.{key}"] = fields.get(field)
  if prefix == "gpt2" and fields.get("n_inner") is None:
    sizes["gpt2.feed_forward_length"] = 4 * fields.get("n_embd", 0)
  if prefix != "gpt2":
    if isinstance(heads, int) and isinstance(fields.get("hidden_size"), int):
      size = fields.get("head_dim") or fields["hidden_size"] // heads
      for key in ("attention.key_length", "attention.value_length"):
        sizes[f"{prefix}.{key}"] = size
      sizes[f"{prefix}.rope.dimension_count"] = size
    if window := fields.get("sliding_window"):
      if architecture is MISTRAL:
        sizes[f"{prefix}.attention.sliding_window"] = window
  lacking = [key for key, value in sizes.items() if value is None]
  if lacking:
    raise UserError(f"{folder}/config.json lacks what {lacking} is made of.")
  return sizes


def _scaling(
  prefix: str, fields: Mapping[str, Any], metadata: dict[str, Any], folder: Path
) -> Written | None:
  """Adds the rotations to the header; Llama 3's scaling is a tensor."""
  if prefix == "gpt2":
    return None
  # transformers 5 keeps both in one field, which older ones kept apart
  rope = fields.get("rope_parameters") or {}
  theta = float(rope.get("rope_theta", fields.get("rope_theta", 10000.0)))
  scaling = fields.get("rope_scaling") or rope
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  numbers = {
    name
    for name, value in scaling.items()
    if value is not None and name not in ("rope_type", "type", "rope_theta")
  }
  original = "original_max_position_embeddings"
  known = {
    "default": {"partial_rotary_factor"},
    "linear": {"factor"},
    "yarn": {"factor", original},
    "llama3": {"factor", original, "low_freq_factor", "high_freq_factor"},
  }
  if kind not in known or numbers - known[kind]:
    raise UserError(
      f"{folder} can't be written as GGUF: its rotations are scaled by {kind!r}"
      f" with {', '.join(sorted(numbers)) or 'no numbers'}."
    )
  metadata[f"{prefix}.rope.freq_base"] = theta
  if kind == "llama3":
    width = metadata[f"{prefix}.rope.dimension_count"]
    factors = llama3_factors(scaling, theta=theta, width=width)
    return Written("F32", factors.shape, lambda: factors)
  if kind in ("linear", "yarn"):
    metadata[f"{prefix}.rope.scaling.type"] = kind
    metadata[f"{prefix}.rope.scaling.factor"] = float(scaling["factor"])
    if kind == "yarn":
      context = scaling.get(original)
      metadata[f"{prefix}.rope.scaling.original_context_length"] = (
        context or fields["max_position_embeddings"]
      )
  return None
