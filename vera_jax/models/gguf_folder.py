"""A GGUF file as a folder in Hugging Face's layout.

Everything here that takes a model takes such a folder. So a file gets one, in
the cache and by its checksum: config.json and the tokenizer's files, made from
the header, and a link to the file itself, or one to each of its parts. The
weights stay where they are and are dequantised one by one as they are loaded,
under Hugging Face's names.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from vera_jax.errors import UserError
from vera_jax.files import (
  TENSORS,
  cached_folder,
  check_file,
  sha256_of,
  write_json,
)
from vera_jax.models.family import FULL, SLIDING
from vera_jax.models.gguf_file import Gguf, decode, files_of, read_gguf
from vera_jax.models.gguf_keys import GEMMA3, GPT2, ROTATING, Keys
from vera_jax.models.gguf_tokenizer import (
  MORE_ENDS,
  check_keys,
  special_ids,
  tokenizer_files,
)
from vera_jax.models.sizes import check_sizes
from vera_jax.operations.gguf_codes import Blocks, take_apart

LINK = "model.gguf"
LAYOUT = 2  # counted up when the folder of the same file becomes another
FREQUENCIES, TABLE = "rope_freqs.weight", "token_embd.weight"
ROWS = 4096  # of the table of words that are dequantised together
LARGEST_GEMMA3 = 62  # layers of the one whose heads are narrower than its scale


class Architecture(NamedTuple):
  """How one of llama.cpp's architectures is written in config.json.

  Attributes:
    model_type, model_class: Hugging Face's.
    fields: config.json's whole numbers and their keys in the header, which
      follow the architecture's name.
    epsilon: the same of the norms' epsilon.
    modules: the header's names of modules and Hugging Face's; {} is the layer.
    biases: the modules that have one, by the field of config.json that says
      whether they do, or by "" where they always do.
    always: further fields of config.json, which a header has no place for.
    keys: what is done with the header's.
    interleaved: whether the rows of q and k are kept as pairs that are rotated
      together, not as two halves of each head.
    transposed: modules whose kernels Hugging Face keeps as (in, out).
    shift: what a norm's weight is more in the file than Hugging Face has it.
  """

  model_type: str
  model_class: str
  fields: Mapping[str, str]
  epsilon: tuple[str, str]
  modules: Mapping[str, str]
  biases: Mapping[str, tuple[str, ...]]
  always: Mapping[str, Any]
  keys: Keys = ROTATING
  interleaved: bool = False
  transposed: tuple[str, ...] = ()
  shift: float = 0.0


LLAMA = Architecture(
  model_type="llama",
  model_class="LlamaForCausalLM",
  fields={
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
  },
  epsilon=("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
  modules={
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
  }
  | {
    f"blk.{{}}.{ours}": f"model.layers.{{}}.{theirs}"
    for ours, theirs in {
      "attn_norm": "input_layernorm",
      "attn_q": "self_attn.q_proj",
      "attn_k": "self_attn.k_proj",
      "attn_v": "self_attn.v_proj",
      "attn_output": "self_attn.o_proj",
      "ffn_norm": "post_attention_layernorm",
      "ffn_gate": "mlp.gate_proj",
      "ffn_up": "mlp.up_proj",
      "ffn_down": "mlp.down_proj",
    }.items()
  },
  biases={
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
  },
  always={"hidden_act": "silu"},
  interleaved=True,
)
MISTRAL = LLAMA._replace(
  model_type="mistral", model_class="MistralForCausalLM", biases={}
)
QWEN2 = LLAMA._replace(
  model_type="qwen2",
  model_class="Qwen2ForCausalLM",
  biases={"": ("attn_q", "attn_k", "attn_v")},
  always={"hidden_act": "silu", "use_sliding_window": False},
  interleaved=False,
)
# The modules of a Llama with norms of each head's queries and keys.
HEAD_NORMS = dict(LLAMA.modules) | {
  f"blk.{{}}.attn_{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm"
  for x in ("q", "k")
}
ARCHITECTURES = {
  "llama": LLAMA,
  "qwen2": QWEN2,
  "qwen3": QWEN2._replace(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    modules=HEAD_NORMS,
    biases={},
  ),
  "gemma3": QWEN2._replace(
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    modules={
      **HEAD_NORMS,
      "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
      "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
      "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    biases={},
    always={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    keys=GEMMA3,
    shift=1.0,
  ),
  "gpt2": Architecture(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    fields={
      "n_positions": "context_length",
      "n_embd": "embedding_length",
      "n_inner": "feed_forward_length",
      "n_layer": "block_count",
      "n_head": "attention.head_count",
    },
    epsilon=("layer_norm_epsilon", "attention.layer_norm_epsilon"),
    modules={
      "token_embd": "transformer.wte",
      "position_embd": "transformer.wpe",
      "output_norm": "transformer.ln_f",
      "output": "lm_head",
    }
    | {
      f"blk.{{}}.{ours}": f"transformer.h.{{}}.{theirs}"
      for ours, theirs in {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
      }.items()
    },
    biases={
      "": ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up")
      + ("ffn_down", "output_norm")
    },
    always={
      "activation_function": "gelu_new",
      "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False,
    },
    keys=GPT2,
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
  ),
}
LAYER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


class Tensors:
  """A file's tensors as `safetensors.safe_open` shows those of a checkpoint."""

  def __init__(self, gguf: Gguf) -> None:
    self.gguf = gguf
    self.architecture, self.fields = architecture_of(gguf), config_fields(gguf)
    check_keys(gguf.metadata, source=gguf.file)  # warns on every load
    self.names = {theirs: ours for ours, theirs in _names(gguf)}

  def keys(self) -> list[str]:
    return list(self.names)

  def get_slice(self, name: str) -> "_Slice":
    tensor = self.gguf.tensors[self.names[name]]
    turned = is_transposed(self.names[name], self.architecture)
    plain = tensor.format in ("F16", "BF16")
    return _Slice(
      tensor.shape[::-1] if turned else tensor.shape,
      tensor.format if plain else "F32",
    )

  def get_tensor(self, name: str) -> Float[np.ndarray, "..."]:
    """The values as Hugging Face has them."""
    ours = self.names[name]
    values = self.gguf.values(ours)
    if is_transposed(ours, self.architecture):
      return values.T
    if is_norm(ours) and self.architecture.shift:
      return values - np.float32(self.architecture.shift)
    heads = interleaved_heads(ours, self.architecture, self.fields)
    return values if heads is None else from_pairs(values, heads=heads)

  def fill(self, name: str, out: Float[np.ndarray, "..."]) -> None:
    """Writes the values into an array, of a large table some rows at a time."""
    ours = self.names[name]
    tensor = self.gguf.tensors[ours]
    if ours != TABLE:
      out[...] = self.get_tensor(name)
      return
    stored = self.gguf.stored(ours).reshape(len(out), -1)
    for start in range(0, len(out), ROWS):
      rows = stored[start : start + ROWS]
      shape = (len(rows), *tensor.shape[1:])
      out[start : start + ROWS] = decode(
        rows.reshape(-1), format=tensor.format, shape=shape
      )

  def get_codes(self, name: str) -> Blocks | None:
    """A matrix's codes [outputs, blocks, ...]; None where they can't be kept.

    The rows are in Hugging Face's order, and are the outputs also where
    Hugging Face has the matrix the other way.
    """
    ours = self.names[name]
    tensor = self.gguf.tensors[ours]
    blocks = take_apart(self.gguf.stored(ours), format=tensor.format)
    if blocks is None:
      return None
    heads = interleaved_heads(ours, self.architecture, self.fields)

    def rows(part: np.ndarray) -> np.ndarray:
      part = part.reshape(tensor.shape[0], -1, part.shape[-1])
      return part if heads is None else from_pairs(part, heads=heads)

    return blocks.with_parts(rows)


class _Slice(NamedTuple):
  shape: tuple[int, ...]
  format: str

  def get_shape(self) -> list[int]:
    return list(self.shape)

  def get_dtype(self) -> str:
    return self.format


def open_tensors(file: Path) -> Tensors:
  """A GGUF file's tensors under Hugging Face's names; see `read_gguf`."""
  return Tensors(read_gguf(file))


def gguf_folder(file: Path) -> Path:
  """The folder in Hugging Face's layout that stands for a GGUF file.

  It is made once for each content and place: for SmolLM2's 98 MB in about a
  second, and found again in 0.1 s, the time of the checksum. It takes 4 MB, for
  the weights are not copied.

  Raises:
    UserError: the file can't be read, or holds what isn't known here.
  """
  file = file.expanduser()
  parts = [part.resolve() for part in files_of(file)]
  key = hashlib.sha256()
  for part in parts:
    check_file(part, inside=None, limit=TENSORS)
    # The place counts too: a copy elsewhere gets a link of its own, which no
    # other process turns elsewhere.
    key.update(f"{LAYOUT} {sha256_of(part)} ".encode() + os.fsencode(part))

  def fill(new: Path) -> None:
    gguf = read_gguf(file)
    fields = config_fields(gguf)
    check_sizes(fields, {name: x.shape for name, x in gguf.tensors.items()})
    write_json(new / "config.json", fields)
    for name, value in tokenizer_files(gguf.metadata, source=file).items():
      write_json(new / name, value)
    if len(parts) == 1:
      (new / LINK).symlink_to(parts[0])
      return
    names = [
      f"model-{number:05}-of-{len(parts):05}.gguf"
      for number in range(1, len(parts) + 1)
    ]
    for name, part in zip(names, parts, strict=True):
      (new / name).symlink_to(part)
    (new / LINK).symlink_to(names[0])  # whose name says which are the others

  return cached_folder("gguf", file, key.hexdigest()[:32], fill)


def architecture_of(gguf: Gguf) -> Architecture:
  """A file's architecture; a window makes a Llama a Mistral."""
  name = gguf.metadata.get("general.architecture")
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise UserError(
      f"{gguf.file}: its architecture is {name!r}; GGUF files are read here of"
      f" {', '.join(ARCHITECTURES)}."
    )
  window = gguf.metadata.get("llama.attention.sliding_window", 0)
  if name == "llama" and not (isinstance(window, int) and window == 0):
    return MISTRAL
  return ARCHITECTURES[name]


def architecture_for(
  model_type: str | None, source: Any
) -> tuple[str, Architecture]:
  """llama.cpp's architecture of one of Hugging Face's, after its name.

  Raises:
    UserError: there is none here; `source` is named as what has this type.
  """
  kinds = {
    architecture.model_type: (name, architecture)
    for name, architecture in ARCHITECTURES.items()
  } | {MISTRAL.model_type: ("llama", MISTRAL)}
  if model_type not in kinds:
    raise UserError(
      f"{source} is a {model_type!r}; GGUF files are written here of"
      f" {', '.join(kinds)}."
    )
  return kinds[model_type]


def module_in_file(name: str, architecture: Architecture) -> str:
  """llama.cpp's name of one of Hugging Face's modules; "" where it has none."""
  layer = LAYER.search(f".{name}.")
  module = LAYER.sub("{}", f".{name}.", count=1)[1:-1]
  names = {theirs: ours for ours, theirs in architecture.modules.items()}
  # a file of the network without its head has no first word in its names
  base = architecture.modules["token_embd"].split(".")[0]
  pattern = names.get(module, names.get(f"{base}.{module}", ""))
  return pattern.format(layer[0] if layer else "")


def module_of(name: str, architecture: Architecture) -> str:
  """Hugging Face's name of a module in a file; "" where it has none."""
  layer = LAYER.search(f".{name}.")
  module = LAYER.sub("{}", f".{name}.", count=1)[1:-1]
  theirs = architecture.modules.get(module, "")
  return theirs.format(layer[0] if layer else "")


def config_fields(gguf: Gguf) -> dict[str, Any]:
  """config.json's fields for a file.

  Raises:
    UserError: the header lacks a field, or has what isn't known here; the
      tensors are not those of the header's architecture.
  """
  architecture = architecture_of(gguf)
  prefix = gguf.metadata["general.architecture"]

  def get(key: str, kinds: Any = int, default: Any = None) -> Any:
    value = gguf.metadata.get(f"{prefix}.{key}", default)
    usable = isinstance(value, kinds) and not isinstance(value, bool)
    if not usable or not 0 <= value < math.inf:  # NaN is refused too
      raise UserError(
        f"{gguf.file}: its header has no usable {prefix}.{key}: {value!r}."
      )
    return value

  if "token_embd.weight" not in gguf.tensors:
    raise UserError(f"{gguf.file} holds no embedding, so it is no whole model.")
  shape = gguf.tensors["token_embd.weight"].shape
  rows, width = shape if len(shape) == 2 else (0, 0)  # refused below
  layers = {x[0] for x in map(LAYER.search, gguf.tensors) if x}
  if width != get("embedding_length") or len(layers) != get("block_count"):
    raise UserError(
      f"{gguf.file} holds {len(layers)} layers of width {width}, not the"
      f" {get('block_count')} of width {get('embedding_length')} of its header."
    )
  if get("expert_count", default=0):
    raise UserError(f"{gguf.file} has experts, which no model here has.")
  architecture.keys.check(gguf.metadata, prefix=f"{prefix}.", source=gguf.file)
  biases = _biases(gguf, architecture, layers=len(layers))
  fields = {
    "architectures": [architecture.model_class],
    "model_type": architecture.model_type,
    "vocab_size": rows,
    **architecture.always,
    "tie_word_embeddings": _is_tied(gguf),
    **_ends(gguf, rows),
  }
  heads = get("attention.head_count")
  grouped = {"attention.head_count_kv": heads}  # what is left out is the same
  for field, key in architecture.fields.items():
    fields[field] = get(key, default=grouped.get(key))
  field, key = architecture.epsilon
  fields[field] = _short(get(key, float))
  groups = get("attention.head_count_kv", default=heads)
  if not heads or width % heads:
    raise UserError(
      f"{gguf.file}: its width doesn't divide into {heads} heads."
    )
  if not groups or heads % groups:
    raise UserError(
      f"{gguf.file} has {heads} heads and {groups} of keys and values."
    )
  size = get("attention.key_length", default=width // heads)
  turned = get("rope.dimension_count", default=size)
  if (
    size % 2
    or architecture.keys is not GPT2
    and turned != size
    or get("attention.value_length", default=size) != size
  ):
    raise UserError(
      f"{gguf.file}: heads of {size} with {turned} rotated values, or with"
      " values of another width than keys, are not known here."
    )
  # llama.cpp has no wider heads there, and no groups in GPT-2
  narrow = architecture.model_type in ("gpt2", "qwen2")
  if narrow and size * heads != width:
    raise UserError(
      f"{gguf.file}: {heads} heads of {size} in a {prefix} of width {width} are"
      " not known here."
    )
  if architecture.model_type == "gpt2" and groups != heads:
    raise UserError(
      f"{gguf.file}: a gpt2 has no groups of heads, not {groups}."
    )
  # Sizes are believed once the tensors have them: arrays are made of them.
  inner, room = get("feed_forward_length"), get("context_length")
  shapes = {
    "blk.0.attn_qkv.weight": (3 * width, width),
    "blk.0.attn_q.weight": (heads * size, width),
    "blk.0.attn_k.weight": (groups * size, width),
    "blk.0.ffn_up.weight": (inner, width),
    "position_embd.weight": (room, width),
  }
  for name, shape in shapes.items():
    if name in gguf.tensors and gguf.tensors[name].shape != shape:
      raise UserError(
        f"{gguf.file}: its tensor {name!r} has the shape"
        f" {gguf.tensors[name].shape}; by its header it has {shape}."
      )
  window = get("attention.sliding_window", default=0)
  if architecture.model_type == MISTRAL.model_type:
    fields["sliding_window"] = window
  elif 0 < window < room and architecture.keys is not GEMMA3:
    raise UserError(
      f"{gguf.file}: its {prefix}.attention.sliding_window is {window}; no"
      f" {prefix} has a window here."
    )
  if architecture.keys is not GPT2:
    fields["head_dim"] = size
    fields["rope_theta"] = _short(get("rope.freq_base", float, 10000.0))
    fields["rope_scaling"] = _scaling(gguf, fields)
  if architecture.keys is GEMMA3:
    if (fields["rope_scaling"] or {}).get("rope_type") == "yarn":
      raise UserError(f"{gguf.file}: a gemma3 with yarn is not known here.")
    every = get("attention.sliding_window_pattern", default=6) if window else 1
    fields |= {
      "sliding_window": window or None,
      "layer_types": [
        SLIDING if every == 0 or (i + 1) % every else FULL
        for i in range(len(layers))
      ],
      "rope_local_base_freq": _short(get("rope.freq_base_swa", float, 10000.0)),
      # which no header has: llama.cpp knows the largest one by its layers
      "query_pre_attn_scalar": (
        width // heads if len(layers) == LARGEST_GEMMA3 else size
      ),
    }
  return fields | biases


def _biases(
  gguf: Gguf, architecture: Architecture, *, layers: int
) -> dict[str, bool]:
  """The fields of config.json about biases, by the tensors that are there.

  Raises:
    UserError: they are not just those of the architecture.
  """

  def names(modules: Iterable[str], leaf: str) -> set[str]:
    return {
      f"{module.format(layer)}.{leaf}"
      for module in modules
      for layer in (range(layers) if "{}" in module else [0])
    }

  present, fields = set(gguf.tensors), {}
  expected = names(architecture.modules, "weight")
  for field, words in architecture.biases.items():
    group = names(
      [x for x in architecture.modules if x.split(".")[-1] in words], "bias"
    )
    if field:
      fields[field] = bool(group & present)
    if not field or fields[field]:
      expected |= group
  if architecture.interleaved:  # alone in llama.cpp
    present -= {FREQUENCIES}
  if left := sorted(present - expected):
    raise UserError(
      f"{gguf.file}: there is no place here for its tensor {left[0]!r}. Is it a"
      " variant of its architecture that is not known here?"
    )
  if lacking := sorted(expected - present - {"output.weight"}):
    raise UserError(f"{gguf.file} lacks the tensor {lacking[0]!r}.")
  return fields


def _ends(gguf: Gguf, rows: int) -> dict[str, Any]:
  """The ids that texts begin and end with, for config.json."""
  tokens = gguf.metadata.get("tokenizer.ggml.tokens")
  if isinstance(tokens, list) and len(tokens) != rows:
    raise UserError(
      f"{gguf.file} has {len(tokens)} tokens and an embedding of {rows} rows."
    )
  ids: dict[str, Any] = special_ids(gguf.metadata)
  more = map(gguf.metadata.get, MORE_ENDS)
  ends = [i for i in (ids.get("eos_token"), *more) if i is not None]
  if not all(isinstance(i, int) for i in (*ids.values(), *ends)):
    raise UserError(f"{gguf.file}: its special ids are {ids}, {ends}.")
  ends = list(dict.fromkeys(ends))
  return {
    "bos_token_id": ids.get("bos_token"),
    "eos_token_id": ends if len(ends) > 1 else ids.get("eos_token"),
    "pad_token_id": ids.get("pad_token"),
  }


def is_transposed(name: str, architecture: Architecture) -> bool:
  """Whether Hugging Face keeps a tensor, by its name here, the other way."""
  module, leaf = name.split(".")[-2:]
  return leaf == "weight" and module in architecture.transposed


def is_norm(name: str) -> bool:
  """Whether a tensor, by its name here, is a norm's weight."""
  return name.endswith("norm.weight")


def interleaved_heads(
  name: str, architecture: Architecture, fields: Mapping[str, Any]
) -> int | None:
  """The heads of a tensor whose rows the file has in pairs, or None."""
  module = name.split(".")[-2]
  if architecture.interleaved and module in ("attn_q", "attn_k"):
    kind = "attention" if module == "attn_q" else "key_value"
    return fields[f"num_{kind}_heads"]
  return None


def from_pairs(
  values: Shaped[np.ndarray, "..."], *, heads: int
) -> Shaped[np.ndarray, "..."]:
  """Rows in pairs (0, 1, 2, ...) as rows in halves (0, 2, ..., 1, 3, ...).

  llama.cpp rotates neighbouring rows of q and k together, Hugging Face's Llama
  a head's first half with its second.
  """
  pairs = values.reshape(heads, -1, 2, *values.shape[1:])
  return pairs.swapaxes(1, 2).reshape(values.shape)


def to_pairs(
  values: Float[np.ndarray, "..."], *, heads: int
) -> Float[np.ndarray, "..."]:
  """The inverse of `from_pairs`."""
  halves = values.reshape(heads, 2, -1, *values.shape[1:])
  return halves.swapaxes(1, 2).reshape(values.shape)


def llama3_factors(
  scaling: Mapping[str, Any], *, theta: float, width: int
) -> Float[np.ndarray, " pairs"]:
  """What Llama 3.1 divides each pair's frequency by.

  Wavelengths beyond the old context / low_freq_factor are stretched by the
  factor, those below the old context / high_freq_factor are left, and those
  between are in between.

  Args:
    scaling: rope_scaling of config.json, of rope_type llama3.
    theta: rope_theta.
    width: of a head.
  """
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  exponents = np.arange(0, width, 2, dtype=np.float64) / width
  turns = scaling["original_max_position_embeddings"] / (
    2 * np.pi * theta**exponents
  )
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)


def _scaling(gguf: Gguf, fields: Mapping[str, Any]) -> dict[str, Any] | None:
  """rope_scaling of config.json, by what llama.cpp does with the keys.

  All frequencies are divided by the factor, unless the type is "none" or
  "yarn", and each by its number in the tensor, if there is one.
  """
  prefix = f"{gguf.metadata['general.architecture']}.rope"
  kind = gguf.metadata.get(f"{prefix}.scaling.type", "")
  old = gguf.metadata.get(f"{prefix}.scale_linear")
  factor = gguf.metadata.get(f"{prefix}.scaling.factor", old)
  if not isinstance(kind, str) or kind not in ("", "none", "linear", "yarn"):
    raise UserError(
      f"{gguf.file}: {prefix}.scaling.type {kind!r} is not known here."
    )
  lacking = factor is None and kind in ("linear", "yarn")
  if lacking or not isinstance(factor, float | None):
    raise UserError(f"{gguf.file}: its {prefix}.scaling lacks a value.")
  # 0 stands for 1
  factor = 1.0 if kind == "none" else _short(factor or 1.0)
  if not 0 < factor < math.inf:
    raise UserError(
      f"{gguf.file}: its {prefix}.scaling has the factor {factor}."
    )
  room, width = fields["max_position_embeddings"], fields["head_dim"]
  each = np.ones(width // 2, np.float32)
  if FREQUENCIES in gguf.tensors:
    each = gguf.values(FREQUENCIES).astype(np.float32)
    fits = each.shape == (width // 2,) and np.isfinite(each).all()
    if not fits or not (each > 0).all():
      raise UserError(
        f"{gguf.file}: {FREQUENCIES} is not one positive number for each of"
        f" {width // 2} pairs."
      )
  plain = bool((each == 1).all())
  if kind == "yarn" and factor != 1:
    original = gguf.metadata.get(f"{prefix}.scaling.original_context_length")
    if not isinstance(original, int | None) or not plain:
      raise UserError(
        f"{gguf.file}: {prefix}.scaling of the type yarn with {FREQUENCIES}, or"
        f" from a length of {original!r}, is not known here."
      )
    return {
      "rope_type": "yarn",
      "factor": factor,
      "original_max_position_embeddings": original or room,
    }
  if plain:
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}
  # Llama 3.1's scaling is in the file as the factors that it comes to. All
  # models that have it share these numbers; only the factor itself differs.
  scaling: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": float(each.max()),
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  made = llama3_factors(scaling, theta=fields["rope_theta"], width=width)
  if factor == 1 and np.allclose(each, made, rtol=2e-5, atol=0):
    return scaling
  # any others: longrope's lists are the same for short texts and long ones
  factors = [_short(x) for x in (each * np.float32(factor)).tolist()]
  return {
    "rope_type": "longrope",
    "factor": 1.0,
    "attention_factor": 1.0,
    "short_factor": factors,
    "long_factor": factors,
    "original_max_position_embeddings": room,
  }


def _names(gguf: Gguf) -> Iterator[tuple[str, str]]:
  """The file's name of each tensor, and Hugging Face's."""
  architecture = architecture_of(gguf)
  tied = _is_tied(gguf)
  for name in gguf.tensors:
    module, _, leaf = name.rpartition(".")
    if name != FREQUENCIES and not (tied and name == "output.weight"):
      yield name, f"{module_of(module, architecture)}.{leaf}"


def _is_tied(gguf: Gguf) -> bool:
  """Whether the head is the embedding, left out or written a second time."""
  if "output.weight" not in gguf.tensors:
    return True
  kinds = {
    gguf.tensors[name].format for name in ("output.weight", "token_embd.weight")
  }
  return len(kinds) == 1 and np.array_equal(
    gguf.stored("output.weight"), gguf.stored("token_embd.weight")
  )


def _short(value: float) -> float:
  """The shortest number that is the same as float32, as a person wrote it."""
  return float(str(np.float32(value)))
