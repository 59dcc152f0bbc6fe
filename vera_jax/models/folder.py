"""A model's folder in Hugging Face's layout, by the name that a user gives."""

import os
from pathlib import Path

from vera_jax import hub
from vera_jax.errors import UserError
from vera_jax.hub import GGUF, PACKAGE
from vera_jax.models.gguf_folder import gguf_folder
from vera_jax.places import local_copy

# Of a model, as patterns.
FILES = [
  "config.json",
  "preprocessor_config.json",
  "generation_config.json",
  "tokenizer*.json",
  "vocab.*",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "*.safetensors",
  "*.safetensors.index.json",
]
NETWORKS = "networks"  # folder of a checkout with what `make` has converted
HINT = (
  " `make images` and `make networks` write such folders; start the command in"
  " the folder of the Makefile."
)


def resolve(name_or_folder: str | Path) -> Path:
  """A local folder for a folder's path or for a model's id on the hub.

  "package:NAME/path" is a folder, or a file inside an installed Python package,
  by `hub.package_place`. A GGUF file gets a folder. From the hub come configs,
  tokenizer files and safetensors only. When it can't be reached, an earlier
  download serves; without one this ends in a UserError within `hub.PATIENCE`
  seconds.
  """
  folder = local_copy(name_or_folder)
  if os.path.isdir(folder):  # a name may be too long for Path.is_dir
    return folder
  name = str(name_or_folder)
  if name.startswith(PACKAGE):
    folder = hub.package_place(name)
  if folder.suffix == GGUF and os.path.isfile(folder):
    return gguf_folder(folder)
  if name.startswith(PACKAGE):
    return folder
  if name.endswith(GGUF):
    raise UserError(f"There is no file {name} (config.model.name).")
  if name.startswith(("/", ".", "~")) or name.count("/") > 1:
    hint = HINT if folder.parent.name == NETWORKS else ""
    raise UserError(f"There is no folder {name} (config.model.name).{hint}")
  return hub.snapshot(
    name,
    files=FILES,
    absent=f"There is no folder {name!r} here, and the hub has no model of that"
    " name (or not for you). config.model.name takes a hub id, or a folder with"
    " config.json, the tokenizer's files and model.safetensors.",
  )
