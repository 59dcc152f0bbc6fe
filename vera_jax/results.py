"""One run, one `result.json`: what tables and plots are made from.

A run whose numbers ceased to be finite has a `failed.json` in its place.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from vera_jax.files import read_json, write_json

FILE = "result.json"
FAILED = "failed.json"
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "datasets",
  "numpy",
)


def provenance() -> dict[str, Any]:
  """Versions and hardware that a figure was made with."""
  device = jax.devices()[0]
  return {
    "versions": {"python": platform.python_version(), **_versions()},
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
  }


def _versions() -> dict[str, str]:
  import vera_jax

  others = {name: version(name) for name in PACKAGES}
  return {"vera_jax": vera_jax.__version__, **others}


def write(
  workdir: Path, result: Mapping[str, Any], file: str = FILE
) -> dict[str, Any]:
  """Mark a run as finished; the result comes back as `read` will give it."""
  write_json(workdir / file, dict(result))
  return json.loads(json.dumps(result))  # its tuples are lists now


def read(workdir: Path, file: str = FILE) -> dict[str, Any] | None:
  """The result of a finished run; None when the folder holds none."""
  path = workdir / file
  return read_json(path) if path.exists() else None


def finished(folder: Path) -> list[Path]:
  """The folders of every finished run below a folder, in order."""
  return [path.parent for path in sorted(folder.rglob(FILE))]


def read_all(folder: Path) -> list[dict[str, Any]]:
  """The results of every finished run below a folder, in order of path."""
  found = map(read, finished(folder))
  return [result for result in found if result is not None]


def read_failures(folder: Path) -> list[dict[str, Any]]:
  """What the failed.json files below a folder say, with each one's `run`."""
  paths = sorted(folder.rglob(FAILED))
  return [{**read_json(path), "run": path.parent.name} for path in paths]
