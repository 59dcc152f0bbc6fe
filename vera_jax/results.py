"""One run, one `result.json`: what tables and plots are made from.

A run whose loss is no longer finite has a `failed.json` in its place.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import vera_jax
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
  """Versions and hardware that a result was made with."""
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      "vera_jax": vera_jax.__version__,
      **{name: version(name) for name in PACKAGES},
    },
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
  }


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
