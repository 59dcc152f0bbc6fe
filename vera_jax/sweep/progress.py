"""How far a run has come, read from its folder while another process trains."""

import json
import os
from pathlib import Path
from typing import NamedTuple

TAIL = 4096  # bytes of metrics.jsonl that are looked at


class Progress(NamedTuple):
  """Of the last lines of metrics.jsonl; None where there was none yet."""

  step: int = 0
  loss: float | None = None
  score: float | None = None
  epoch: int | None = None


def read_progress(folder: Path) -> Progress:
  """The latest step, loss, and score of an epoch."""
  found: dict = {}
  for line in _tail(folder / "metrics.jsonl"):
    try:
      values = json.loads(line)
    except ValueError:  # its beginning lies before the tail
      continue
    found["step"] = values.pop("step", 0)
    if "loss" in values:
      found["loss"] = values["loss"]
    if "epoch" in values:
      found["epoch"] = int(values.pop("epoch"))
      found["score"] = next(iter(values.values()), None)
  return Progress(**found)


def _tail(path: Path) -> list[str]:
  try:
    with path.open("rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - TAIL))
      return file.read().decode("utf-8", "replace").splitlines()
  except OSError:
    return []
