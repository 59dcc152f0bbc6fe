"""Files that are kept to save time, and may be made again at any moment."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def keep(path: Path, write: Callable[[Any], Any]) -> None:
  """Writes beside the place and renames: readers never see half a file.

  What can't be kept is only told.
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
