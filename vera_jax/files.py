"""Files and folders written whole or not at all; JSON objects read with clear
errors."""

import hashlib
import json
import os
import shutil
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


def make_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
  """Let `fill` write into a folder that appears whole or not at all.

  Where several processes make the same folder, the first one's is kept.

  Raises:
    UserError: it can't be written.
  """
  new = folder.with_name(f".{uuid.uuid4().hex}.new")
  try:
    new.mkdir(parents=True)
    fill(new)
    try:
      new.rename(folder)
    except OSError:
      if not folder.is_dir():  # else another process was faster
        raise
  except OSError as error:
    raise UserError(f"{folder} can't be written: {error}.") from error
  finally:
    shutil.rmtree(new, ignore_errors=True)


def cached_folder(
  kind: str, file: Path, key: str, fill: Callable[[Path], Any]
) -> Path:
  """The folder in Hugging Face's layout that stands for a file, made once.

  Args:
    kind: of the file, which has a folder of the cache.
    file: gives the folder its name.
    key: of what is in the folder: it becomes another one with another key.
    fill: writes it, config.json among its files.

  Raises:
    UserError: it can't be written.
  """
  cache = Path("~/.cache/vera_jax").expanduser() / kind
  folder = cache / f"{file.stem[:40]}-{key}"
  if not (folder / "config.json").is_file():
    make_folder(folder, fill)
  return folder


def check_free(folder: str | Path) -> Path:
  """The folder to write into, with ~ as the home folder.

  Raises:
    UserError: it is a file, or is not empty.
  """
  folder = Path(folder).expanduser()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} is there already; choose another --out.")
  return folder


def sha256_of(file: Path) -> str:
  """A file's checksum in hexadecimal digits.

  Raises:
    UserError: it can't be read.
  """
  try:
    with file.open("rb") as opened:
      return hashlib.file_digest(opened, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror}.") from error
