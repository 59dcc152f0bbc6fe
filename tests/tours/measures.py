"""What the round trips measure: differences of numbers, bytes of files."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tests.tours.page import Step
from vera_jax.adapters.files import load_adapter, tensors
from vera_jax.train.checkpoint import Checkpoints
from vera_jax.train.setup import Setup, build_setup

ROUND = 1e-4  # a logit in float32, computed in another order
MOVED = 1e-2  # a logit, by an adapter that was trained
SAME = 0.0  # bit for bit
NAMES = {
  "vera": "VeRA",
  "lora": "LoRA",
  "dora": "DoRA with rsLoRA's scale",
  "pvera": "PVeRA",
  "randlora": "RandLoRA",
  "unilora": "Uni-LoRA",
  "ia3": "IA3",
}


def largest(one: Any, two: Any) -> float:
  """The largest difference of two arrays' numbers."""
  return float(np.abs(np.asarray(one) - np.asarray(two)).max())


def files_size(folder: Path) -> int:
  """Bytes of JSON and tensors; PEFT writes a model card as well."""
  files = [*folder.glob("adapter*.json"), *folder.glob("*.safetensors")]
  return sum(file.stat().st_size for file in files)


def trained_and_saved(
  config: ConfigDict, run: Path, *, step: int
) -> tuple[Setup, Any, Step]:
  """The run's adapter folder beside the best epoch's checkpoint, at `step`.

  Returns:
    What the run was made of, the checkpoint's trained leaves, and the
    comparison.
  """
  setup = build_setup(config)
  with Checkpoints(run / "checkpoints") as saves:
    state, _ = saves.restore(step, setup.shape)
  found, stored = tensors(state.params), load_adapter(run / "adapter").tensors
  difference = float("inf")
  if found.keys() == stored.keys():
    difference = max(largest(found[name], stored[name]) for name in found)
  compared = Step(
    "train → adapter folder",
    "all trained numbers: checkpoint, folder",
    difference,
    SAME,
    written=files_size(run / "adapter"),
  )
  return setup, state.params, compared
