"""What a model family is, and the table of them.

A family is an architecture as its checkpoints have it: it reads config.json,
makes a plain linen module that knows no adapters, and says how the tensors of
its files are named and how its weights are split over devices. A new family is
one file with a `FAMILY`, and one line in `FAMILIES`.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from vera_jax.errors import UserError
from vera_jax.files import read_json


class Names(NamedTuple):
  """How a family's files name what the parameter tree has.

  A tree's path is the tensor's name without prefix, "/" for ".", a layer's
  number behind "_" (`encoder/layer_3`), and flax's names of leaves for torch's.

  Attributes:
    prefixes: words that a file may have before a base's names.
    renamed: old spellings in files and the ones that are used now.
    unused: beginnings of names that no task has a place for, such as buffers
      and pretraining heads.
    new: beginnings of paths that a task may bring itself, such as its head.
  """

  prefixes: tuple[str, ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()
  unused: tuple[str, ...] = ()
  new: tuple[str, ...] = ()


class Family(NamedTuple):
  """A model family.

  Attributes:
    config: config.json's fields -> a dataclass; what the module can't honour
      is a UserError. It has at least `vocab_size`, `num_hidden_layers`,
      `num_attention_heads` and `model_type`.
    module: (config, head, outputs, *, dtype, param_dtype, scan, remat) -> a
      linen module from the arrays of `inputs` to the head's outputs.
    inputs: (rows, length, slots) -> the shapes of the module's keyword inputs,
      which a packed batch has under the same names.
    names: of the tensors in its files.
    rules: (pattern over a leaf's path, mesh axes of its last axes), first match
      wins; other leaves lie on every device.
    room: config -> the most tokens that a text may have.
    classes: transformers' class for each kind of head that the module has:
      "classification" gives outputs [rows, slots, outputs], one for each
      example; "token_classification" [rows, length, outputs], one for each
      token.
  """

  config: Callable[[Mapping[str, Any]], Any]
  module: Callable[..., nn.Module]
  inputs: Callable[[int, int, int], dict[str, Any]]
  names: Names
  rules: tuple[tuple[str, tuple[str | None, ...]], ...]
  room: Callable[[Any], int]
  classes: Mapping[str, str]


# config.json's model_type -> the module of this package that has its FAMILY.
FAMILIES = {"bert": "bert", "roberta": "bert"}


def family_of(fields: Mapping[str, Any]) -> Family:
  """The family that a config.json names.

  Raises:
    UserError: there is no such family here.
  """
  kind = fields.get("model_type")
  if kind not in FAMILIES:
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


def load_config(folder: Path) -> Any:
  """A folder's config.json as its family's dataclass."""
  fields = read_fields(folder)
  return family_of(fields).config(fields)
