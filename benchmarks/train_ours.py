"""Our side of `benchmarks.train`: the run that a user would start."""

import time
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.process import Settings, serve
from vera_jax.imports import no_torch_in_transformers
from vera_jax.train.loop import train_and_evaluate


def train(settings: Settings) -> dict[str, Any]:
  """Scores of each epoch, numbers trained."""
  imported = time.time()
  config = ConfigDict(settings["config"])
  with no_torch_in_transformers():  # as in a command
    result = train_and_evaluate(config, settings["workdir"])
  parameters = result["parameters"]
  memory = jax.local_devices()[0].memory_stats() or {}
  return {
    "imported": imported,
    "scores": [epoch["score"] for epoch in result["history"]],
    "evaluation": result["evaluation_seconds"],
    "train_loss": result["history"][-1]["train_loss"],
    "trained": parameters["adapter"] + parameters["head"],
    "device_peak_bytes": memory.get("peak_bytes_in_use"),
  }


if __name__ == "__main__":
  serve(train)
