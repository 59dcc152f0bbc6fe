"""PEFT's side of `benchmarks.train --task=cifar10`: a network on images.

The loop that one would write with care: images decoded once and kept as bytes,
batches normalised as they are needed, loss and logits as transformers computes
them, SDPA attention, fused AdamW. Imports nothing of vera_jax, whose libraries
would count as its own.
"""

import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from benchmarks.process import Settings, serve
from benchmarks.train_torch import build, computing, mean, outcome, stepper


def train(settings: Settings) -> dict[str, Any]:
  """Classes of the dev images at the end, numbers trained."""
  config, device = settings["config"], settings["device"]
  if config["method"] in ("vera", "lora"):
    import peft  # noqa: F401  counted among the imports
  imported = time.time()
  torch.manual_seed(config["seed"])
  splits = {name: read(files) for name, files in settings["images"].items()}
  kind = AutoModelForImageClassification
  model = build(settings, kind=kind, task=None).to(device)
  order = settings["order"]
  step = stepper(model, settings, steps=len(order))
  pixels, labels = splits["train"]
  losses = []
  model.train()
  for rows in order:
    batch = normalised(pixels[rows], settings)
    losses.append(step({"pixel_values": batch, "labels": labels[rows]}))
  train_loss, begun = mean(losses), time.time()  # all steps are done
  with computing(settings):
    dev = predict(model, splits["dev"][0], settings)
  return outcome(
    model,
    settings,
    imported=imported,
    evaluation=time.time() - begun,
    predictions=[dev],
    train_loss=train_loss,
  )


def read(files: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
  """All images' bytes, channels first, and their classes."""
  pixels = []
  for name, _ in files:
    with Image.open(name) as image:
      pixels.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
  labels = torch.tensor([label for _, label in files])
  return torch.from_numpy(np.stack(pixels)), labels


def normalised(pixels: torch.Tensor, settings: Settings) -> torch.Tensor:
  """By the colours' means and deviations."""
  mean, std = (
    torch.tensor(settings[name])[:, None, None] for name in ("mean", "std")
  )
  return (pixels * settings["scale"] - mean) / std


@torch.inference_mode()
def predict(model: Any, pixels: torch.Tensor, settings: Settings) -> list[int]:
  """Classes, in the order of the images."""
  model.eval()
  device, size = settings["device"], settings["config"]["eval_batch_size"]
  classes: list[int] = []
  for some in pixels.split(size):
    batch = normalised(some, settings).to(device)
    classes += model(pixel_values=batch).logits.argmax(-1).tolist()
  return classes


if __name__ == "__main__":
  serve(train)
