"""A checksum manifest in each save: damage is noticed before it is used.

Orbax writes a save under a temporary name and renames it at the end, so that a
save which was cut off never counts. It does not notice bytes that change
later, or that the disk lost in a crash: a flipped bit in an array restores as
another number. The manifest has the checksum of each file and, since saves may
be copied between folders, the config they belong to. It is written last.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import (
  TENSORS,
  check_file,
  open_file,
  read_json,
  write_json,
)
from vera_jax.places import is_remote, list_files

FILE = "manifest.json"
FILES, OWN = "sha256", "own_sha256"  # of all files by name; of the manifest


def _checksum(file: Path, folder: Path) -> str:
  with open_file(file, inside=folder, limit=TENSORS) as data:
    return hashlib.file_digest(data, "sha256").hexdigest()


def _own(fields: Mapping[str, Any]) -> str:
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
  """Write a folder's manifest, with JSON values that say what it belongs to."""
  checksums = {
    name: _checksum(folder / name, folder)
    for name in list_files(folder)
    if name != FILE
  }
  # as JSON will read it back: tuples are lists there
  read_back = json.loads(json.dumps({**fields, FILES: checksums}))
  write_json(folder / FILE, {**read_back, OWN: _own(read_back)})


def read_manifest(folder: Path) -> dict[str, Any]:
  """What the manifest says, if it is whole.

  Raises:
    UserError: it is missing or damaged; the message names the file.
  """
  file = folder / FILE
  if not file.exists():
    raise UserError(f"{file} is missing: the save was cut off")
  fields = read_json(file)
  is_whole = fields.pop(OWN, None) == _own(fields)
  if not is_whole or not isinstance(fields.get(FILES), dict):
    raise UserError(f"{file} is damaged")
  return fields


def find_damage(folder: Path) -> str | None:
  """Which file is not as the manifest has it, and how; None if all are."""
  try:
    # orbax opens them by itself; in a store there are no links
    for name in [] if is_remote(folder) else list_files(folder):
      check_file(folder / name, inside=folder, limit=TENSORS)
    for name, checksum in read_manifest(folder)[FILES].items():
      if not (folder / name).is_file():
        return f"{folder / name} is missing"
      if _checksum(folder / name, folder) != checksum:
        return f"{folder / name} is damaged: its checksum differs"
  except UserError as error:
    return str(error)
  except OSError as error:
    return f"{error.filename} can't be read: {error.strerror}"
  return None
