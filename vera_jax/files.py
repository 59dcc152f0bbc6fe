"""Files written whole or not at all; JSON objects read with clear errors."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vera_jax.errors import UserError


def read_json(file: Path, *, hint: str = "") -> dict[str, Any]:
  """The object in a file.

  Args:
    file: UTF-8 text.
    hint: a sentence for the user that every error ends with.

  Raises:
    UserError: the file is missing, unreadable, or holds something else.
  """
  end = f" {hint}" if hint else ""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"There is no {file}.{end}") from error
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror}.{end}") from error
  except ValueError as error:
    raise UserError(f"{file} can't be read as JSON: {error}.{end}") from error
  if not isinstance(value, dict):
    raise UserError(f"{file} can't be read: it is not a JSON object.{end}")
  return value


def write_json(path: Path, value: Any) -> None:
  """Write a value as indented JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Write UTF-8 text, whole or not at all."""
  write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
  """Let `write` fill a file that appears whole or not at all.

  Readers never see half of it, not even when the machine goes down. Where
  several processes write the same file, the last one's is kept.
  """
  new = path.with_name(f".{path.name}-{uuid.uuid4().hex}.new")
  try:
    with new.open("xb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  except BaseException:
    new.unlink(missing_ok=True)
    raise
