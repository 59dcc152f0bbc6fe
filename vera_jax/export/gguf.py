"""A decoder's folder in Hugging Face's layout as one GGUF file.

Weights come out as F32, F16, BF16 or Q8_0. Four bits are refused for a merged
model: the change that an adapter makes is smaller than their steps, so that
rounding the merged weights again takes most of it back (docs/gguf.md has the
measurements).
"""

import logging
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vera_jax.errors import UserError
from vera_jax.export.hf import write_merged
from vera_jax.models import gemma3
from vera_jax.models.family import FULL, config_of, read_fields
from vera_jax.models.gguf_file import (
  FORMATS,
  Gguf,
  Tensor,
  Written,
  block_of,
  refuse_there,
  write_gguf,
)
from vera_jax.models.gguf_folder import (
  ARCHITECTURES,
  FREQUENCIES,
  LINK,
  LLAMA,
  MISTRAL,
  Architecture,
  architecture_for,
  config_fields,
  interleaved_heads,
  is_norm,
  is_transposed,
  llama3_factors,
  module_in_file,
  open_tensors,
  to_pairs,
)
from vera_jax.models.gguf_keys import GEMMA3
from vera_jax.models.gguf_tokenizer import tokenizer_metadata
from vera_jax.models.hf_weights import read_model, tensor_files
from vera_jax.models.llama import ORIGINAL, rotation_fields
from vera_jax.models.safetensors_file import SafetensorsFile
from vera_jax.operations.attention import ACTIVATIONS
from vera_jax.places import is_remote, local_copy, place
from vera_jax.pretrained.classifier import Classifier

log = logging.getLogger(__name__)
KINDS = {  # the format of matrices, and llama.cpp's number of such a file
  "gguf-f32": ("F32", 0),
  "gguf-f16": ("F16", 1),
  "gguf-bf16": ("BF16", 32),
  "gguf-q8_0": ("Q8_0", 7),
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
TRAINING = ("dropout", "pdrop", "initializer_range")  # endings of their fields
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


def write_merged_gguf(
  model: Classifier, file: str | Path, *, kind: str
) -> tuple[dict[str, Any], dict[str, int]]:
  """Write a decoder with its adapter folded in.

  Args:
    model: from `restore_adapter`, in float32.
    file, kind: as for `write_gguf_of`.

  Returns:
    What `write_merged` says of the merge, and the tensors of each format.

  Raises:
    UserError: as these two do; nothing is written then.
  """
  check_kind(kind)
  file = place(file)
  refuse_there(file)
  check_model(model.folder)
  file.parent.mkdir(parents=True, exist_ok=True)
  beside = None if is_remote(file) else file.parent
  with tempfile.TemporaryDirectory(dir=beside) as temporary:
    merged = Path(temporary) / "merged"
    about = write_merged(model, merged)  # in float32, checked on probe texts
    return about, write_gguf_of(merged, file, kind=kind)


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
  folder, file = local_copy(folder), place(file)
  refuse_there(file)
  fields = read_model(folder)
  prefix, architecture = _architecture(fields, folder)
  config = config_of(fields)  # what the model here computes with
  format, file_type = KINDS[kind]
  biased = {x for modules in architecture.biases.values() for x in modules}
  tensors: dict[str, Written] = {}
  with ExitStack() as stack:
    for source in tensor_files(folder):
      opened: Any = (
        open_tensors(source)
        if source.name == LINK
        else stack.enter_context(SafetensorsFile(source))
      )
      for name in opened.keys():
        module, _, leaf = name.rpartition(".")
        # a config ties only what is one, by `read_model`
        tied = config.tie_word_embeddings and module == "lm_head"
        if name.endswith(BUFFERS) or tied:
          continue
        known = module_in_file(module, architecture)
        leaves = ("weight", "bias")[: 1 + (known.split(".")[-1] in biased)]
        if not known or leaf not in leaves:
          raise UserError(
            f"{folder} can't be written as GGUF: there is no place in a"
            f" {prefix!r} for its tensor {name!r}."
          )
        ours = f"{known}.{leaf}"
        turned = is_transposed(ours, architecture)
        shape = tuple(opened.get_slice(name).get_shape())
        shape = shape[::-1] if turned else shape
        stored = format if len(shape) > 1 else "F32"
        if shape[-1] % block_of(stored)[0]:
          stored = "F16"
        tensors[ours] = Written(
          stored,
          shape,
          partial(
            _values,
            opened,
            name,
            turned=turned,
            heads=interleaved_heads(ours, architecture, vars(config)),
            shift=architecture.shift if is_norm(ours) else 0.0,
          ),
        )
    if not config.tie_word_embeddings and "output.weight" not in tensors:
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
      **_sizes(prefix, architecture, config),
    }
    if architecture is not ARCHITECTURES["gpt2"]:
      turned_by = fields
      if architecture.keys is GEMMA3:  # of the layers that see all
        turned_by = gemma3.rotation_fields(fields, FULL)
      rope = rotation_fields(turned_by, room=config.max_position_embeddings)
      factors = _scaling(prefix, rope, metadata, folder)
      if factors is not None:
        tensors[FREQUENCIES] = Written("F32", factors.shape, lambda: factors)
    metadata |= tokenizer_metadata(folder, rows=rows)
    _check_return(folder, config, metadata, tensors)
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
  model_type = fields.get("model_type")
  prefix, architecture = architecture_for(model_type, folder)
  rope = fields.get("rope_parameters") or {}
  plain = {**architecture.always, "partial_rotary_factor": 1}
  for name, value in plain.items():
    stated = fields.get(name, rope.get(name))
    if stated is not None and _activation(stated) != _activation(value):
      raise UserError(
        f"{folder} can't be written as GGUF: its {name} is {stated!r}, for"
        f" which the header of a {model_type} has no place."
      )
  return prefix, architecture


def _activation(value: Any) -> Any:
  """What a name stands for, if it is an activation's: some have several."""
  return ACTIVATIONS.get(value, value) if isinstance(value, str) else value


def _values(
  opened: Any, name: str, *, turned: bool, heads: int | None, shift: float
) -> np.ndarray:
  values = opened.get_tensor(name)
  if shift:
    return values.astype(np.float32) + np.float32(shift)
  if turned:
    return values.T
  return values if heads is None else to_pairs(values, heads=heads)


def _sizes(
  prefix: str, architecture: Architecture, config: Any
) -> dict[str, Any]:
  """The header's numbers of an architecture."""
  sizes: dict[str, Any] = {
    f"{prefix}.{key}": getattr(config, field)
    for field, key in LLAMA.fields.items()  # by the names of all configs
    if key in architecture.fields.values()
  }
  field, key = architecture.epsilon
  sizes[f"{prefix}.{key}"] = float(getattr(config, field))
  if prefix == "gpt2":
    return sizes
  for key in ("attention.key_length", "attention.value_length"):
    sizes[f"{prefix}.{key}"] = config.head_dim
  sizes[f"{prefix}.rope.dimension_count"] = config.head_dim
  if architecture.keys is GEMMA3 and any(config.slides):
    whole = [i for i, slides in enumerate(config.slides, 1) if not slides]
    every, theta = (whole or [0])[0], config.local_frequencies[-1]
    # the last frequency is the base to the power of 2 / width - 1
    theta **= config.head_dim / (2 - config.head_dim)
    sizes[f"{prefix}.attention.sliding_window"] = config.sliding_window
    sizes[f"{prefix}.attention.sliding_window_pattern"] = every
    sizes[f"{prefix}.rope.freq_base_swa"] = float(theta)
  if architecture is MISTRAL and any(config.slides):
    window, room = config.sliding_window, config.max_position_embeddings
    sizes[f"{prefix}.attention.sliding_window"] = window
    if window < room:
      log.warning(
        "llama.cpp has no architecture for Mistral's sliding window: there, a"
        " token sees all %d before it, not the last %d as here. Its answers are"
        " others where a text is longer than %d tokens.",
        room,
        window,
        window,
      )
  return sizes


def _scaling(
  prefix: str, rope: Mapping[str, Any], metadata: dict[str, Any], folder: Path
) -> Float[np.ndarray, " pairs"] | None:
  """Adds the rotations to the header, or returns the tensor that they are."""
  kind = rope["rope_type"]
  numbers = set(rope) - {"rope_type", "rope_theta", ORIGINAL}
  known = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor"},
  }
  if prefix == "llama":  # which alone has the tensor
    known |= {
      "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
      "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    }
  if kind not in known or numbers - known[kind]:
    raise UserError(
      f"{folder} can't be written as GGUF: its rotations are scaled by {kind!r}"
      f" with {', '.join(sorted(numbers)) or 'no numbers'}, for which llama.cpp"
      f" has no place in a {prefix}."
    )
  theta = float(rope["rope_theta"])
  metadata[f"{prefix}.rope.freq_base"] = theta
  if kind == "llama3":
    width = metadata[f"{prefix}.rope.dimension_count"]
    return llama3_factors(rope, theta=theta, width=width)
  if kind == "longrope":
    return np.array(rope["short_factor"], np.float32)
  if kind != "default":
    metadata[f"{prefix}.rope.scaling.type"] = kind
    room = metadata[f"{prefix}.context_length"]
    metadata[f"{prefix}.rope.scaling.factor"] = float(
      rope.get("factor", room / rope[ORIGINAL])
    )
    if kind == "yarn":
      metadata[f"{prefix}.rope.scaling.original_context_length"] = int(
        rope[ORIGINAL]
      )
  return None


def _check_return(
  folder: Path,
  config: Any,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, Written],
) -> None:
  """Refuses a model that would be read from its file as another one."""
  factors = tensors.get(FREQUENCIES)
  values = np.zeros(0) if factors is None else factors.values()
  data = values.view(np.uint8)
  places = {
    name: Tensor(x.shape, x.format, 0, (x is factors) * data.size)
    for name, x in tensors.items()
  }
  fields = config_fields(Gguf(folder, dict(metadata), places, (data,)))
  read = vars(config_of(fields))
  for name, value in vars(config).items():
    if name in ("model_type", "tie_word_embeddings") or name.endswith(TRAINING):
      continue  # a Mistral without a window is a Llama; the head was compared
    numbers = name.endswith("frequencies") or isinstance(value, float)
    if not (
      np.allclose(read[name], value, rtol=1e-5, atol=0)
      if numbers
      else _activation(read[name]) == _activation(value)
    ):
      raise UserError(
        f"{folder} can't be written as GGUF: its {name} {str(value)[:80]} would"
        f" be read as {str(read[name])[:80]}."
      )
