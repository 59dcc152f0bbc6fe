"""What a tour walks on: a folder, a config, a base and pairs of sentences."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import quickstart
from vera_jax.data.examples import Examples
from vera_jax.hub import resolve
from vera_jax.tasks.glue import glue_task
from vera_jax.tasks.glue_data import load_split

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {"train": 160, "dev": 32}  # the first of each split are used


class Ground(NamedTuple):
  """An empty folder, the run's config, the base, the
  pairs that are trained on and those that are compared."""

  place: Path
  config: ConfigDict
  base: Path
  train: Examples
  probes: Examples

  @property
  def run(self) -> Path:
    return self.place / "run"

  @property
  def adapter(self) -> Path:
    return self.run / "adapter"


def make_ground(place: Path) -> Ground:
  config = quickstart.get_config()
  source = _first_pairs(ROOT / config.data.source, place / "pairs")
  config.data.source = str(source)
  config.data.cache_dir = str(place / "tokens")
  config.model.dtype = "float32"
  config.optim.batch_size = 16
  config.optim.epochs = 2
  task = glue_task(config.task)
  train, dev = (
    load_split(task, source, name) for name in ("train", "validation")
  )
  return Ground(place, config, resolve(config.model.name), train, dev)


def _first_pairs(source: Path, folder: Path) -> Path:
  folder.mkdir()
  for name, count in PAIRS.items():
    lines = (source / f"{name}.tsv").read_text().splitlines(keepends=True)
    (folder / f"{name}.tsv").write_text("".join(lines[: count + 1]))
  return folder
