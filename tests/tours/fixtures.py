"""Fixtures of the round-trip tests: a config, a base, pairs of sentences."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import quickstart
from vera_jax.data.examples import Examples
from vera_jax.models.folder import resolve
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import glue_task

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {"train": 160, "dev": 32}  # the first of each split are used


class Fixtures(NamedTuple):
  """What all round trips share.

  Attributes:
    folder: empty at the start; each step of a trip writes below it.
    config: of the training run.
    base: the base's folder.
    train: the pairs to train on.
    probes: the pairs whose logits are compared.
  """

  folder: Path
  config: ConfigDict
  base: Path
  train: Examples
  probes: Examples


def make_fixtures(folder: Path) -> Fixtures:
  """The quickstart's config on the first pairs of its data."""
  config = quickstart.get_config()
  original, source = ROOT / config.data.source, folder / "pairs"
  source.mkdir()
  for name, count in PAIRS.items():
    lines = (original / f"{name}.tsv").read_text().splitlines(keepends=True)
    (source / f"{name}.tsv").write_text("".join(lines[: count + 1]))
  config.data.source = str(source)
  config.data.cache_dir = str(folder / "tokens")
  config.model.dtype = "float32"
  config.optim.batch_size = 16
  config.optim.epochs = 2
  task = glue_task(config.task)
  train, dev = (
    load_split(task, source, name) for name in ("train", "validation")
  )
  return Fixtures(folder, config, resolve(config.model.name), train, dev)
