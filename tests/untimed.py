"""What a run left but for its times, of which no two runs have the same."""

import json
from pathlib import Path
from typing import Any

from vera_jax.results import SPEED

TIMES = ("seconds", "evaluation_seconds", "speed")


def without_times(values: dict[str, Any]) -> dict[str, Any]:
  """A result or a save's progress, without the fields that are of time."""
  return {name: x for name, x in values.items() if name not in TIMES}


def untimed_metrics(workdir: Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, without the metrics that are of time."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {name: x for name, x in json.loads(line).items() if SPEED not in name}
    for line in lines
  ]
