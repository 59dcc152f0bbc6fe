"""The JSON objects that runs, adapters and models are described by."""

import json
from pathlib import Path
from typing import Any

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
