"""The folder of an example's run, which goes on where it was stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError


def run_folder(name: str | None, settings: Mapping[str, Any]) -> Path:
  """The folder, made if need be, with the settings of its run in it.

  Args:
    name: as it was asked for.
    settings: what a run that goes on must have had from the start.

  Raises:
    UserError: no folder is named, or its run has other settings.
  """
  if not name:
    raise UserError("Say where the run is kept: --workdir=DIR")
  folder = Path(name).resolve()
  folder.mkdir(parents=True, exist_ok=True)
  file, text = folder / "settings.json", json.dumps(settings, indent=2)
  if not file.exists():
    file.write_text(text)
  elif (before := file.read_text()) != text:
    raise UserError(
      f"{folder} holds a run with other settings:\n{before}\nName another"
      " folder, or these settings."
    )
  return folder
