"""Hugging Face checkpoints and parameter trees, both ways and without torch.

A checkpoint is a folder with config.json and model.safetensors, or shards and
their index, or what `gguf_folder` made of a GGUF file. torch keeps a dense
kernel as (out, in), the tree as (in, out); a scanned tree stacks the layers
that a checkpoint numbers, but for the last.
"""

import hashlib
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from vera_jax.errors import UserError
from vera_jax.files import TENSORS, check_file, open_file, read_json
from vera_jax.layer_names import layer_name
from vera_jax.models.family import (
  Names,
  config_of,
  family_of,
  read_fields,
)
from vera_jax.models.gguf_file import files_of
from vera_jax.models.gguf_folder import LINK, Tensors, open_tensors
from vera_jax.models.sizes import check_sizes
from vera_jax.operations.gguf_codes import keep
from vera_jax.operations.quantised import (
  INT8,
  KEEP,
  NF4,
  NONE,
  Quantised,
  stack_layers,
)
from vera_jax.operations.quantised import quantise as quantise_kernel

log = logging.getLogger(__name__)
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  **{name: name for name in ("cls_token", "position_embeddings", "lambda1")},
}
ALIGNED = 64  # bytes
FLOATS = ("F64", "F32", "F16", "BF16")
CONVERT = (
  'python -c "import torch, safetensors.torch as s; s.save_file('
  "{k: v.clone().contiguous() for k, v in torch.load('pytorch_model.bin', "
  "weights_only=True).items()}, 'model.safetensors')\""
)


class Loaded(NamedTuple):
  """What a checkpoint gave a tree, and what found no partner.

  `missing` are parameter paths ("classifier/kernel"), the others the
  checkpoint's own names: `dropped` those that a classifier never uses (id
  buffers, pretraining heads), `unexpected` all the rest.
  """

  params: dict[str, Any]
  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  dropped: tuple[str, ...]


class Source(NamedTuple):
  """One tensor of a checkpoint: its name there and the open file."""

  name: str
  file: Any


def module_name(
  path: tuple[str, ...],
  *,
  layer: int | None = None,
  names: Names | None = None,
) -> str:
  """The dotted name of the module at a path of the tree, by `layer_name`.

  With `names` it is the name in the files of that family's sequence
  classifiers, such as "bert.encoder.layer.3.attention.self.query".
  """
  name = layer_name(path, layer=layer)
  if names is None:
    return name
  prefix = "" if path[0] in names.outside else names.prefixes[0]
  return prefix + names.to_file(name)


def module_path(name: str, names: Names) -> tuple[str, ...]:
  """The inverse: the path in a looped tree, without the base's prefix."""
  known = re.sub(r"\blayer\.(?=\d)", "layer_", _known_name(name, names))
  return tuple(known.split("."))


def load_params(
  folder: Path,
  template: Mapping[str, Any],
  *,
  param_dtype: DTypeLike | None = None,
  quantise: str = NONE,
  kernels: Collection[tuple[str, ...]] = (),
) -> Loaded:
  """Fills a tree of shapes from a checkpoint, one tensor in memory at a time.

  Args:
    folder: the checkpoint.
    template: one `jax.ShapeDtypeStruct` per leaf: the "params" of an
      `eval_shape` of the model's init.
    param_dtype: of the leaves, which come as numpy arrays; None for the
      template's own types.
    quantise: what the `kernels`, by their paths, become: a name in
      `quantised.CHOICES`. Those that can't, since their blocks would not be
      whole or the file has no codes of them, stay arrays.

  Raises:
    UserError: a file or tensor that can't be used; codes are to be kept, and
      the checkpoint is no GGUF file.
  """
  known = family_of(read_fields(folder)).names
  if quantise == KEEP and tensor_files(folder)[0].name != LINK:
    raise UserError(
      f"config.model.quantise is {KEEP}, but {folder} is no GGUF file, so it"
      f" has no codes to keep: choose {INT8} or {NF4}, or name a quantised GGUF"
      " file (config.model.name)."
    )
  filled: dict[tuple[str, ...], Any] = {}
  missing: list[str] = []
  used: set[str] = set()
  with ExitStack() as stack:
    sources = _open_sources(folder, known, stack)
    for path, leaf in flatten_dict(dict(template)).items():
      names = _tensor_names(path, leaf.shape)
      parts = [sources[name] for name in names if name in sources]
      used.update(source.name for source in parts)
      if not parts:
        missing.append("/".join(path))
      elif len(parts) < len(names):
        written = _tensor_names(path, leaf.shape, names=known)
        absent = next(
          file
          for file, name in zip(written, names, strict=True)
          if name not in sources
        )
        raise UserError(f"{folder} lacks the tensor {absent!r}.")
      else:
        dtype = leaf.dtype if param_dtype is None else param_dtype
        codes = None
        if quantise != NONE and path in kernels:
          codes = _read_codes(
            path, leaf.shape, parts, quantise, dtype, known.transposed
          )
        filled[path] = codes or _read_leaf(
          path,
          leaf.shape,
          parts,
          dtype=dtype,
          transposed=known.transposed,
          frozen=quantise != NONE,
        )
    rest = {
      name: source
      for name, source in sources.items()
      if source.name not in used
    }
    unused = {name for name in rest if name.startswith(known.unused)}
    if known.tied and rest.keys() & known.tied:
      output, table = known.tied
      # of a part of the network nothing is said
      if table in rest or not _differ(sources[output], sources[table]):
        unused.add(output)
  return Loaded(
    unflatten_dict(filled),
    tuple(sorted(missing)),
    tuple(sorted(s.name for name, s in rest.items() if name not in unused)),
    tuple(sorted(s.name for name, s in rest.items() if name in unused)),
  )


def refuse_gaps(folder: Path, missing: Sequence[str]) -> None:
  """Only a head may be new; raises a UserError where another leaf is."""
  may_be_new = family_of(read_fields(folder)).names.new
  gaps = [name for name in missing if not name.startswith(may_be_new)]
  if gaps:
    shown = ", ".join(gaps[:5]) + (", ..." if len(gaps) > 5 else "")
    raise UserError(
      f"{folder} lacks {len(gaps)} of the network's weights: {shown}. Is it"
      " the checkpoint that its config.json describes?"
    )


def read_model(folder: Path) -> dict[str, Any]:
  """A folder's config.json, as `read_fields`, that is of the weights beside it.

  Where it ties the output layer to the table of words, and the files have an
  output layer of other numbers, `tie_word_embeddings` is false: transformers
  uses these as well.

  Raises:
    UserError: as `read_fields`, `check_sizes` and `config_of` say.
  """
  fields = read_fields(folder)
  if tensor_files(folder)[0].name == LINK:
    return fields  # made and checked here
  names = family_of(fields).names
  with ExitStack() as stack:
    sources = _open_sources(folder, names, stack)
    check_sizes(
      fields,
      {
        source.name: tuple(source.file.get_slice(source.name).get_shape())
        for source in sources.values()
      },
    )
    if (
      names.tied
      and sources.keys() >= set(names.tied)
      and config_of(fields).tie_word_embeddings
      and _differ(*(sources[name] for name in names.tied))
    ):
      log.warning(
        "%s ties the output layer to the embeddings by its config.json, but has"
        " one with other numbers, which is used: tie_word_embeddings is false.",
        folder,
      )
      fields["tie_word_embeddings"] = False
  return fields


def fingerprint(folder: Path) -> str:
  """sha256 over the weight files, which tells one base from another."""
  sha = hashlib.sha256()
  for file in tensor_files(folder):
    for part in files_of(file):
      with open_file(part, inside=None, limit=TENSORS) as opened:
        sha.update(hashlib.file_digest(opened, "sha256").digest())
  return sha.hexdigest()


def to_hf(params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
  """The tree as the state dict of its head's class, in torch's layout."""
  known = family_of({"model_type": config.model_type}).names
  tensors = {}
  for path, leaf in flatten_dict(dict(params)).items():
    names = _tensor_names(path, leaf.shape, names=known)
    value = np.asarray(leaf)
    layers = value if "layer" in path else [value]
    for name, array in zip(names, layers, strict=True):
      if known.transposed and path[-1] == "kernel":
        array = _in_file(array)
      tensors[name] = np.ascontiguousarray(array)
  return tensors


def _tensor_names(
  path: tuple[str, ...], shape: Sequence[int], *, names: Names | None = None
) -> list[str]:
  """The tensors of a leaf: one, or one per layer where layers are stacked.

  `names` as for `module_name`.
  """
  if path[-1] not in LEAVES:
    raise ValueError(f"{'/'.join(path)} is no parameter of the model.")
  layers = range(shape[0]) if "layer" in path else [None]
  return [
    module_name(path[:-1], layer=layer, names=names) + f".{LEAVES[path[-1]]}"
    for layer in layers
  ]


def _read_leaf(
  path: tuple[str, ...],
  shape: tuple[int, ...],
  sources: Sequence[Source],
  *,
  dtype: DTypeLike,
  transposed: bool,
  frozen: bool,
) -> np.ndarray:
  # checked before there is room for it, for the shape is somebody's config.json
  one = np.broadcast_to(0, shape[1:] if "layer" in path else shape)
  turned = transposed and path[-1] == "kernel"
  for source in sources:
    _check_tensor(source, (_in_file(one) if turned else one).shape)
  leaf = _lasting(shape, dtype) if frozen else np.empty(shape, dtype)
  for slot, source in zip(
    leaf if "layer" in path else leaf[None], sources, strict=True
  ):
    if transposed and path[-1] == "kernel":
      slot = _in_file(slot)
    if isinstance(source.file, Tensors):
      source.file.fill(source.name, slot)
    else:
      slot[...] = source.file.get_tensor(source.name)
  return leaf


def _lasting(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
  """An empty array whose memory JAX takes for its own on a CPU, uncopied.

  It does so where an array begins at a multiple of 64 bytes. A base in codes is
  trained by no method, so nobody writes into it later.
  """
  size = math.prod(shape) * jnp.dtype(dtype).itemsize
  data = np.empty(size + ALIGNED, np.uint8)
  first = -data.ctypes.data % ALIGNED
  return data[first : first + size].view(dtype).reshape(shape)


def _check_tensor(source: Source, shape: tuple[int, ...]) -> None:
  """Refuse a tensor of another shape, or of numbers that are not read."""
  header = source.file.get_slice(source.name)
  stored = tuple(header.get_shape())
  if stored != shape:
    raise UserError(
      f"Tensor {source.name!r} has shape {stored} in the checkpoint, but "
      f"the model of its config.json and task needs {shape}."
    )
  if header.get_dtype() not in FLOATS:
    raise UserError(
      f"Tensor {source.name!r} is stored as {header.get_dtype()}; only "
      f"{', '.join(FLOATS)} can be read. Use an unquantised checkpoint."
    )


def _read_codes(
  path: tuple[str, ...],
  shape: tuple[int, ...],
  sources: Sequence[Source],
  kind: str,
  dtype: DTypeLike,
  transposed: bool,
) -> Quantised | None:
  """A leaf in codes; None where a layer of it can't be."""
  stacked, table = "layer" in path, path[-1] == "embedding"
  in_file = shape[-2:]
  if transposed and not table:
    in_file = in_file[::-1]
  layers = []
  for source in sources:
    _check_tensor(source, in_file)
    if kind == KEEP:
      codes = source.file.get_codes(source.name)
      layer = keep(codes, dtype=dtype, table=table)
    else:
      kernel = source.file.get_tensor(source.name)
      kernel = kernel.T if transposed else kernel
      try:
        layer = quantise_kernel(kernel, kind, dtype=dtype)
      except UserError as error:
        raise UserError(
          f"Tensor {source.name!r} can't be quantised: {error}"
        ) from error
    if layer is None:
      return None
    layers.append(layer)
  return stack_layers(layers) if stacked else layers[0]


def _in_file(kernel: np.ndarray) -> np.ndarray:
  """A kernel's view as torch has it: (out, in), or (out, in, height, width)."""
  return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def _open_sources(
  folder: Path, names: Names, stack: ExitStack
) -> dict[str, Source]:
  """Every tensor under its name in a looped tree."""
  sources: dict[str, Source] = {}
  for file in tensor_files(folder):
    if file.name == LINK:
      opened: Any = open_tensors(file)
    else:
      opened = stack.enter_context(open_safetensors(file))
    for name in opened.keys():
      known = _known_name(name, names)
      if known in sources:
        raise UserError(
          f"{folder} holds both {sources[known].name!r} and {name!r}, which "
          f"name one parameter; keep one."
        )
      sources[known] = Source(name, opened)
  return sources


def _differ(one: Source, other: Source, *, rows: int = 4096) -> bool:
  """Whether two tensors' numbers do, of which few are read at a time."""
  first, second = (s.file.get_slice(s.name) for s in (one, other))
  shape = first.get_shape()
  if not shape or shape != second.get_shape():
    return True
  starts = range(0, shape[0], rows)
  parts = [slice(i, min(i + rows, shape[0])) for i in starts]
  return not all(np.array_equal(first[part], second[part]) for part in parts)


def _known_name(name: str, names: Names) -> str:
  """A name in a file as the tree has it, dotted, without the base's prefix."""
  for prefix in names.prefixes:
    name = name.removeprefix(prefix)
  for old, new in names.renamed:
    name = name.replace(old, new)
  return names.to_tree(name)


def open_safetensors(file: Path) -> Any:
  """An open file; a UserError where it is damaged."""
  try:
    return safe_open(file, framework="numpy")
  except (SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is missing or no whole safetensors file ({error}); fetch or copy"
      " it again."
    ) from error


def tensor_files(folder: Path) -> list[Path]:
  """The files of a folder's weights.

  Raises:
    UserError: there are none, or one is missing, elsewhere or no regular file.
  """
  if (folder / "model.safetensors").is_file():
    files = ["model.safetensors"]
  elif (folder / LINK).is_file():  # our own link to where the file is
    check_file(folder / LINK, inside=None, limit=TENSORS)
    return [folder / LINK]
  else:
    files = _shards(folder)
  for file in files:
    try:
      check_file(folder / file, inside=folder, limit=TENSORS)
    except UserError as error:
      if isinstance(error.__cause__, FileNotFoundError):
        raise UserError(
          f"{folder / file}, which the index names, is missing; fetch or copy"
          " it again."
        ) from error
      raise
  return [folder / file for file in files]


def _shards(folder: Path) -> list[str]:
  """The files that a folder's index names; a UserError where it has none."""
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    files = read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
      raise UserError(f"{index} has no weight_map; fetch or copy it again.")
    return sorted(set(names))
  if any(folder.glob("pytorch_model*.bin")):
    raise UserError(
      f"{folder} has its weights in torch's pickle format, which is not read "
      f"here. Convert them once, in that folder and where torch is installed: "
      f"{CONVERT}"
    )
  raise UserError(
    f"{folder} has neither model.safetensors nor "
    f"model.safetensors.index.json (config.model.name)."
  )
