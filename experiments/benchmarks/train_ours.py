"""Our contender of `benchmark train`: the run that a user would start."""

import time
from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.benchmarks.contender import Settings, serve
from vera_jax.train.loop import train_and_evaluate

Span = tuple[float, float]
COMPILING = "/jax/core/compile/"


def train(settings: Settings) -> dict[str, Any]:
  """Seconds spent compiling, scores of each epoch, numbers trained."""
  imported = time.time()
  spans: list[Span] = []

  def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
    if event.startswith(COMPILING):
      spans.append((start_time, end_time))

  jax.monitoring.register_event_time_span_listener(listen)
  try:
    result = train_and_evaluate(
      ConfigDict(settings["config"]), settings["workdir"]
    )
  finally:
    jax.monitoring.unregister_event_time_span_listener(listen)
  parameters = result["parameters"]
  memory = jax.local_devices()[0].memory_stats() or {}
  return {
    "imported": imported,
    "compilation": covered(spans),
    "scores": [epoch["score"] for epoch in result["history"]],
    "trained": parameters["adapter"] + parameters["head"],
    "device_peak_bytes": memory.get("peak_bytes_in_use"),
  }


def covered(spans: Iterable[Span]) -> float:
  """Seconds in which any span runs: nested traces count once."""
  total, until = 0.0, float("-inf")
  for start, end in sorted(spans):
    total += max(0.0, end - max(start, until))
    until = max(until, end)
  return total


if __name__ == "__main__":
  serve(train)
