"""A save's checksums: damage is noticed before anything goes on from it.

`seal.json` is written last, so a save without it was cut off.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.train.workdir import write_json

FILE = "seal.json"
FILES, OWN = "sha256", "own_sha256"


def _files(folder: Path) -> Iterator[Path]:
  for path in sorted(folder.rglob("*")):
    if path.is_file() and path != folder / FILE:
      yield path


def _checksum(file: Path) -> str:
  with file.open("rb") as data:
    return hashlib.file_digest(data, "sha256").hexdigest()


def _own(facts: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_seal(folder: Path, facts: Mapping[str, Any]) -> None:
  """Seal a folder as it is, with JSON values that say what it belongs to."""
  names = {str(f.relative_to(folder)): _checksum(f) for f in _files(folder)}
  whole = json.loads(json.dumps({**facts, FILES: names}))
  write_json(folder / FILE, {**whole, OWN: _own(whole)})


def read_seal(folder: Path) -> dict[str, Any]:
  """What the seal says, if it is whole.

  Raises:
    UserError: it is missing or damaged; the message names the file.
  """
  file = folder / FILE
  if not file.exists():
    raise UserError(f"{file} is missing: the save was cut off")
  facts = read_json(file)
  if facts.pop(OWN, None) != _own(facts) or FILES not in facts:
    raise UserError(f"{file} is damaged")
  return facts


def damage(folder: Path) -> str | None:
  """Which file is not as it was sealed, and how; None for a whole save."""
  try:
    sealed = read_seal(folder)[FILES]
    for name, checksum in sealed.items():
      if not (folder / name).is_file():
        return f"{folder / name} is missing"
      if _checksum(folder / name) != checksum:
        return f"{folder / name} is damaged: its checksum differs"
  except UserError as error:
    return str(error)
  except OSError as error:
    return f"{error.filename} can't be read: {error.strerror}"
  return None
