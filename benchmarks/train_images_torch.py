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
from transformers import (
  AutoModelForImageClassification,
  get_linear_schedule_with_warmup,
)

from benchmarks.process import Settings, serve
from benchmarks.train_torch import adamw, build, trainable


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
  optimiser = adamw(model, config)
  order = settings["order"]
  warmup = int(config["optim"]["warmup_ratio"] * len(order))
  schedule = get_linear_schedule_with_warmup(optimiser, warmup, len(order))
  half = settings["dtype"] == "bfloat16"
  compute = torch.autocast(device, dtype=torch.bfloat16, enabled=half)
  pixels, labels = splits["train"]
  losses = []
  model.train()
  for rows in order:
    batch = normalised(pixels[rows], settings).to(device)
    with compute:
      loss = model(pixel_values=batch, labels=labels[rows].to(device)).loss
    loss.backward()
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    losses.append(loss.item())
  begun = time.time()
  with compute:
    dev = predict(model, splits["dev"][0], settings)
  cuda = device == "cuda"
  return {
    "imported": imported,
    "compilation": 0.0,
    "evaluation": time.time() - begun,
    "predictions": [dev],
    "train_loss": sum(losses) / len(losses),
    "trained": sum(leaf.numel() for leaf in trainable(model).values()),
    "threads": torch.get_num_threads(),
    "attention": model.config._attn_implementation,
    "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
  }


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
  found: list[int] = []
  for some in pixels.split(size):
    batch = normalised(some, settings).to(device)
    found += model(pixel_values=batch).logits.argmax(-1).tolist()
  return found


if __name__ == "__main__":
  serve(train)
