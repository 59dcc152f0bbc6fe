"""What a model family is, and the table of them.

A family is an architecture as its checkpoints have it: it reads config.json,
makes a plain linen module that knows no adapters, and says how the tensors of
its files are named and how its weights are split over devices. A new family is
one file with a `FAMILY`, and one line in `FAMILIES`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import flax.linen as nn

from vera_jax.errors import UserError
from vera_jax.files import read_json

TEXTS, IMAGES = "texts", "images"
LABELS = 100_000  # at most, where config.json names none of them


class Names(NamedTuple):
  """How a family's files name what the parameter tree has.

  A tree's path is the tensor's name without prefix, "/" for ".", a layer's
  number behind "_" (`encoder/layer_3`), and flax's names of leaves for torch's.
  Every tree has its layers in `encoder/layer...`, whatever the file calls them.

  Attributes:
    prefixes: words that a file may have before a base's names; the first is
      written.
    outside: modules beside the base, whose names have no prefix.
    renamed: old spellings in files and the ones that are used now.
    unused: beginnings of names that no task has a place for, such as buffers
      and pretraining heads.
    new: beginnings of paths that a task may bring itself, such as its head.
    transposed: whether files have kernels as (out, in), as torch's linear layer
      does; trees have (in, out).
    to_file, to_tree: a module's dotted name in a looped tree -> in a file,
      prefix aside, and back, where the two are not the same.
    to_class: a module's name in a file -> in transformers' class, which PEFT
      goes by, where the two are not the same.
  """

  prefixes: tuple[str, ...] = ("",)
  outside: tuple[str, ...] = ("classifier",)
  renamed: tuple[tuple[str, str], ...] = ()
  unused: tuple[str, ...] = ()
  new: tuple[str, ...] = ()
  transposed: bool = True
  to_file: Callable[[str], str] = str
  to_tree: Callable[[str], str] = str
  to_class: Callable[[str], str] = str


class Family(NamedTuple):
  """A model family.

  Attributes:
    config: config.json's fields -> a dataclass; what the module can't honour
      is a UserError. It has at least `hidden_size`, `num_hidden_layers`,
      `num_attention_heads` and `model_type`; of texts also `vocab_size`.
    module: (config, head, outputs, *, dtype, param_dtype, scan, remat) -> a
      linen module from the arrays of `inputs` to the head's outputs.
    inputs: (rows, length, slots) -> the shapes of the module's keyword inputs,
      which a batch has under the same names. The length is in tokens; of images
      it is the pixels of a side.
    names: of the tensors in its files.
    rules: (pattern over a leaf's path, mesh axes of its last axes), first match
      wins; other leaves lie on every device.
    room: config -> the most tokens that a text may have; images are resized.
    classes: transformers' class for each kind of head that the module has:
      "classification" gives outputs [rows, slots, outputs], one for each
      example; "token_classification" [rows, length, outputs], one for each
      token; "language_modelling" `decoder.Words`, for each read position.
    head: pattern of the paths of the head, which every method trains.
    output: pattern of the paths of a pretrained output layer, which the method
      "head" trains and others leave as it is; "" where tasks bring a head.
    fixed: pattern of the paths of leaves that no method trains, such as running
      statistics; "" for none.
    stacks: whether its layers are alike, so that they may be stacked.
    own: whether the architecture is this package's alone, so that transformers
      and PEFT have no class for it.
    fused: config -> the parts of fused kernels, which targets may name: by a
      layer's pattern, each part's first and last column by name.
    reads: what the inputs are, `TEXTS` or `IMAGES`.
    example: the sizes, as `inputs` takes them, that shapes are traced with.
  """

  config: Callable[[Mapping[str, Any]], Any]
  module: Callable[..., nn.Module]
  inputs: Callable[[int, int, int], dict[str, Any]]
  names: Names
  rules: tuple[tuple[str, tuple[str | None, ...]], ...]
  room: Callable[[Any], int]
  classes: Mapping[str, str]
  head: str = "classifier/.*"
  output: str = ""
  fixed: str = ""
  stacks: bool = True
  own: bool = False
  fused: Callable[[Any], Mapping[str, Mapping[str, tuple[int, int]]]] = (
    lambda config: {}
  )
  reads: str = TEXTS
  example: tuple[int, int, int] = (1, 8, 1)


# config.json's model_type -> the module of this package that has its FAMILY.
FAMILIES = {
  "bert": "bert",
  "roberta": "bert",
  "xlm-roberta": "bert",
  "camembert": "bert",
  "distilbert": "distilbert",
  "modernbert": "modernbert",
  "gpt2": "gpt2",
  "llama": "llama",
  "mistral": "llama",
  "qwen2": "llama",
  "qwen3": "llama",
  "vit": "vit",
  "dinov2": "dinov2",
  "efficientnet_lite": "efficientnet",
  "char_lstm": "char_lstm",
}


def family_of(fields: Mapping[str, Any]) -> Family:
  """The family that a config.json names.

  Raises:
    UserError: there is no such family here.
  """
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f"config.json: model_type is {kind!r}; this package has"
      f" {', '.join(map(repr, FAMILIES))}."
    )
  module = importlib.import_module(f"vera_jax.models.{FAMILIES[kind]}")
  return module.FAMILY[kind]


def read_fields(folder: Path) -> dict[str, Any]:
  """A folder's config.json."""
  hint = "config.model.name takes a folder in Hugging Face's layout."
  return read_json(folder / "config.json", hint=hint)


def label_names(fields: Mapping[str, Any]) -> list[str]:
  """The labels of a config.json in the order of the logits, which is by id.

  Without names they are LABEL_0, LABEL_1 and so on, as transformers has them.

  Raises:
    UserError: ids that are no numbers.
  """
  try:
    count = int(fields.get("num_labels", 2))
    if count > LABELS and not fields.get("id2label"):
      raise ValueError
    names = fields.get("id2label") or {i: f"LABEL_{i}" for i in range(count)}
    ordered = sorted((int(key), str(value)) for key, value in names.items())
  except (AttributeError, TypeError, ValueError, OverflowError) as error:
    raise UserError("config.json: no usable id2label or num_labels.") from error
  return [name for _, name in ordered]


def config_of(fields: Mapping[str, Any]) -> Any:
  """The fields of a config.json as its family's dataclass.

  Raises:
    UserError: there is no such family here, or it can't honour a field.
  """
  read = family_of(fields).config
  try:
    return read(fields)
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    raise UserError(f"config.json has an unusable value: {error}.") from error


def load_config(folder: Path) -> Any:
  """A folder's config.json as its family's dataclass."""
  return config_of(read_fields(folder))


def one_of(fields: Mapping[str, Any], name: str, allowed: Iterable[Any]) -> Any:
  """A field of config.json, if it is among the values that a module knows."""
  value, known = fields.get(name), tuple(allowed)
  if value not in known:
    words = ", ".join(repr(word) for word in known if word is not None)
    raise UserError(
      f"config.json: {name} is {value!r}; this model supports {words}."
    )
  return value


def take_fields(cls: type, fields: Mapping[str, Any]) -> Any:
  """A config dataclass from the fields of the same names.

  Raises:
    UserError: one is missing or of a wrong type, or heads don't divide.
  """
  hints = get_type_hints(cls)
  taken = {name: fields[name] for name in hints if name in fields}
  wrong = [
    field.name
    for field in dataclasses.fields(cls)
    if not isinstance(
      taken.get(field.name, field.default), hints[field.name] | int
    )
  ]
  if wrong:
    raise UserError(f"config.json has no usable {', '.join(wrong)}.")
  config = cls(**taken)
  if config.hidden_size % config.num_attention_heads:
    raise UserError(
      f"config.json: hidden_size {config.hidden_size} does not divide into "
      f"num_attention_heads {config.num_attention_heads}."
    )
  return config
