"""Files that are kept to save time, and may be made again at any moment."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vera_jax.files import write_file

log = logging.getLogger(__name__)


def keep(path: Path, write: Callable[[BinaryIO], Any]) -> None:
  """Write a file of the cache; if that can't be done, only warn."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, write)
  except OSError as error:
    log.warning("%s isn't cached: %s.", path, error.strerror)
