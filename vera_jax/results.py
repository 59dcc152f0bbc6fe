"""One run, one `result.json`: what tables and plots are made from.

A run whose loss is no longer finite has a `failed.json` in its place.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from vera_jax.files import (
  BLANK,
  DATA,
  JsonLine,
  json_lines,
  open_file,
  read_json,
  read_lines,
  write_json,
)
from vera_jax.version import __version__

FILE = "result.json"
FAILED = "failed.json"
METRICS = "metrics.jsonl"
SPEED = "speed/"  # how the names of metrics begin that are of time
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
  versions = {}
  for name in PACKAGES:
    with suppress(PackageNotFoundError):  # datasets is an extra
      versions[name] = version(name)
  return {
    "versions": {
      "python": platform.python_version(),
      "vera_jax": __version__,
      **versions,
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


def metric_lines(workdir: Path) -> Iterator[tuple[bytes, JsonLine]]:
  """Each line of a run's metrics.jsonl, as it is and as it is read.

  One that can't be read, or has no step, says so in its `error`. Blank lines
  are left out, and so is a last one that was cut off when the run was killed.

  Raises:
    UserError: the file can't be read.
  """
  file = workdir / METRICS
  if not file.exists():
    return
  with open_file(file, inside=file.parent, limit=DATA) as opened:
    lines = list(read_lines(opened, name=file))
  for raw, line in zip(lines, json_lines(lines, nan=True), strict=True):
    if line.error == BLANK or (line.error and not raw.endswith(b"\n")):
      continue
    if not line.error and type(line.values.get("step")) is not int:
      line = line._replace(error="it has no step")
    yield raw.rstrip(b"\r\n") + b"\n", line


def read(workdir: Path, file: str = FILE) -> dict[str, Any] | None:
  """The result of a finished run; None when the folder holds none."""
  path = workdir / file
  return read_json(path) if path.exists() else None
