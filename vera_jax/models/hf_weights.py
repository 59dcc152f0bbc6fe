"""Hugging Face checkpoints and parameter trees, both ways and without torch.

A checkpoint is a folder with config.json and model.safetensors, or shards and
their index, or what `gguf_folder` made of a GGUF file. torch keeps a dense
kernel as (out, in), the tree as (in, out); a scanned tree stacks the layers
that a checkpoint numbers, but for the last.
"""

import hashlib
import logging
import re
from collections.abc import (
  Callable,
  Collection,
  Mapping,
  Sequence,
)
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

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
from vera_jax.models.gguf_folder import LINK, open_tensors
from vera_jax.models.leaves import (
  Leaf,
  Place,
  Source,
  file_axes,
  put_parts,
  read_codes,
  read_leaf,
)
from vera_jax.models.safetensors_file import SafetensorsFile
from vera_jax.models.sizes import check_sizes
from vera_jax.operations.quantised import INT8, KEEP, NF4, NONE

log = logging.getLogger(__name__)
Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  **{name: name for name in ("cls_token", "position_embeddings", "lambda1")},
}
CONVERT = (
  'python -c "import torch, safetensors.torch as s; s.save_file('
  "{k: v.clone().contiguous() for k, v in torch.load('pytorch_model.bin', "
  "weights_only=True).items()}, 'model.safetensors')\""
)


def no_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
  """The `Bar` that shows nothing."""
  return nullcontext(lambda count: None)


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
  place: Place | None = None,
  bar: Bar = no_bar,
) -> Loaded:
  """Fills a tree of shapes from a checkpoint, some of its bytes at a time.

  Args:
    folder: the checkpoint.
    template: one `jax.ShapeDtypeStruct` per leaf: the "params" of an
      `eval_shape` of the model's init.
    param_dtype: of the leaves; None for the template's own types.
    quantise: what the `kernels`, by their paths, become: a name in
      `quantised.CHOICES`. Those that can't, since their blocks would not be
      whole or the file has no codes of them, stay arrays.
    place: where each leaf lies, or each part of one in codes. Of safetensors a
      process then reads the slices that its devices hold; a GGUF file's leaves
      are made whole, one after another. None for numpy arrays.
    bar: the bytes that this process will read -> a context that yields a
      function of each part's bytes, such as `progress.bytes_bar`.

  Raises:
    UserError: a file or tensor that can't be used; codes are to be kept, and
      the checkpoint is no GGUF file.
  """
  known = family_of(read_fields(folder)).names
  is_gguf = tensor_files(folder)[0].name == LINK
  there = None if is_gguf else place
  if quantise == KEEP and not is_gguf:
    raise UserError(
      f"config.model.quantise is {KEEP}, but {folder} is no GGUF file, so it"
      f" has no codes to keep: choose {INT8} or {NF4}, or name a quantised GGUF"
      " file (config.model.name)."
    )
  filled: dict[tuple[str, ...], Any] = {}
  leaves: list[Leaf] = []
  missing: list[str] = []
  used: set[str] = set()
  with ExitStack() as stack:
    sources = _open_sources(folder, known, stack)
    for path, wanted in flatten_dict(dict(template)).items():
      names = _tensor_names(path, wanted.shape)
      parts = [sources[name] for name in names if name in sources]
      used.update(source.name for source in parts)
      if not parts:
        missing.append("/".join(path))
      elif len(parts) < len(names):
        written = _tensor_names(path, wanted.shape, names=known)
        absent = next(
          file
          for file, name in zip(written, names, strict=True)
          if name not in sources
        )
        raise UserError(f"{folder} lacks the tensor {absent!r}.")
      else:
        leaf = Leaf(
          path,
          wanted.shape,
          jnp.dtype(wanted.dtype if param_dtype is None else param_dtype),
          parts,
          turned=known.transposed and path[-1] == "kernel",
        )
        # before there is room for it: its shape is of somebody's config.json
        leaf.check()
        leaves.append(leaf)
    with bar(sum(leaf.share(there) for leaf in leaves)) as advance:
      for leaf in leaves:
        leaf, made = leaf._replace(advance=advance), None
        if quantise != NONE and leaf.path in kernels:
          made = read_codes(leaf, quantise, there)
        if made is None:
          made = read_leaf(leaf, there)
        if is_gguf and place is not None:
          made = put_parts(leaf.path, made, place)
        filled[leaf.path] = made
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
      sha.update(_digest(part))
  return sha.hexdigest()


def _digest(file: Path) -> bytes:
  with open_file(file, inside=None, limit=TENSORS) as opened:
    digest = hashlib.file_digest(opened, "sha256")
  # as which the hub's cache names a large file
  name = file.resolve().name
  if re.fullmatch("[0-9a-f]{64}", name) and name != digest.hexdigest():
    log.warning(
      "%s is not as the hub has it: its checksum is %s, and was %s. Delete it,"
      " and it is fetched again.",
      *(file, digest.hexdigest(), name),
    )
  return digest.digest()


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
        array = array.transpose(file_axes(array.ndim))
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


def _open_sources(
  folder: Path, names: Names, stack: ExitStack
) -> dict[str, Source]:
  """Every tensor under its name in a looped tree."""
  sources: dict[str, Source] = {}
  for file in tensor_files(folder):
    if file.name == LINK:
      opened: Any = open_tensors(file)
    else:
      opened = stack.enter_context(SafetensorsFile(file))
    for name in opened.keys():
      known = _known_name(name, names)
      if known in sources:
        raise UserError(
          f"{folder} holds both {sources[known].name!r} and {name!r}, which "
          f"name one parameter; keep one."
        )
      sources[known] = Source(name, opened)
  return sources


def _differ(one: Source, other: Source) -> bool:
  """Whether two tensors' numbers do, of which few are read at a time."""
  first, second = (s.file.get_slice(s.name) for s in (one, other))
  shape = first.get_shape()
  if not shape or shape != second.get_shape():
    return True
  everything = (slice(None),) * len(shape)
  return not all(
    np.array_equal(block, second[part, *everything[1:]])
    for part, block in first.blocks(everything)
  )


def _known_name(name: str, names: Names) -> str:
  """A name in a file as the tree has it, dotted, without the base's prefix."""
  for prefix in names.prefixes:
    name = name.removeprefix(prefix)
  for old, new in names.renamed:
    name = name.replace(old, new)
  return names.to_tree(name)


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
