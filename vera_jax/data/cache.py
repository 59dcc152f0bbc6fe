"""Writes cache files: they save time and can be made again at any moment."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_cache(path: Path, write: Callable[[Any], Any]) -> None:
  """Calls `write` with a binary file that becomes `path` once it is complete.

  The file is written beside `path` and renamed, so that another process never
  reads half of it. If it can't be written, a warning is all that happens.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
      with os.fdopen(handle, "wb") as file:
        write(file)
      os.replace(name, path)
    except BaseException:
      os.unlink(name)
      raise
  except OSError as error:
    log.warning("%s isn't cached: %s.", path, error.strerror)
