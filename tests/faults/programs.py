"""The programs that train, each tiny, for faults that are tried on all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.fixtures import Launcher

WIDE: dict[str, Any] = {
  "hidden_size": 64,
  "intermediate_size": 64,
}  # kernels with nf4's blocks
ROWS = 40  # a decoder's training rows: ten steps an epoch


def ensemble(folder: Path, **options: Any) -> Launcher:
  """Two seeds in one program."""
  launcher = Launcher(folder, **options)
  launcher.name, launcher.seeds = "ensemble", (0, 1)
  return launcher


def quantised(folder: Path, **options: Any) -> Launcher:
  """A classifier on a base in nf4."""
  launcher = Launcher(folder, **options, **WIDE)
  launcher.name = "quantised"
  launcher.settings["model.quantise"] = "nf4"
  return launcher


def decoder(folder: Path, *, epochs: int, dropout: bool = True) -> Launcher:
  """A decoder that learns to write."""
  from tests.tasks.decoder_files import GPT2, write_decoder

  launcher = Launcher(folder, epochs=epochs)
  launcher.name = "decoder"
  launcher.module, launcher.config = (
    "experiments.language",
    "configs/language.py",
  )
  model, data = folder / "decoder", folder / "data"
  if not model.exists():
    model.mkdir()
    chance = 0.1 * dropout
    drops = {"resid_pdrop": chance, "embd_pdrop": chance, "attn_pdrop": chance}
    write_decoder(model, GPT2 | drops)
    for name, first in (("train", 0), ("dev", ROWS)):
      rows = [_row(first + number) for number in range(ROWS)]
      text = "".join(json.dumps(row) + "\n" for row in rows)
      (data / f"{name}.jsonl").write_text(text)
  launcher.settings = {
    "model.name": model,
    "data.train": data / "train.jsonl",
    "data.dev": data / "dev.jsonl",
    "data.max_length": 8,
    "data.cache_dir": folder / "tokens",
    "optim.epochs": epochs,
    "optim.batch_size": 4,
    "optim.adapter_lr": 0.05,
    "vera.rank": 4,
    "log.every": 1,
  }
  return launcher


def _row(number: int) -> dict[str, str]:
  words = [f"word{(number * step + 3) % 20}" for step in (1, 3, 7, 9)]
  return {"prompt": " ".join(words[:2]), "completion": " ".join(words[2:])}


TRAINING: dict[str, Callable[..., Launcher]] = {
  "classifier": Launcher,
  "ensemble": ensemble,
  "decoder": decoder,
  "quantised": quantised,
}
