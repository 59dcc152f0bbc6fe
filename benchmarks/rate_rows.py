"""The rows of the study of the rule for the rate, which no other study has.

  python -m benchmarks.rate_rows --glue=GLUE --images=CIFAR10 --out=ROWS

GLUE and CIFAR10 are the folders of the other studies. SST-2: sentences that are
neither among the first 30,000 by `data.subset_seed` 0 of the training file nor
of the part of it that `benchmarks.held_out` leaves to studies. CIFAR-10:
training images that are not the first 150 of their class by any seed that the
studies of images have. Drawn once, from seed 32. ROWS/smollm2_base is SmolLM2
with the first 8 of its layers.
"""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from configs.e2e import SMOLLM2
from experiments import cli
from vera_jax.data.image_files import draw_shots
from vera_jax.errors import UserError
from vera_jax.files import write_json
from vera_jax.models.folder import resolve

GLUE = flags.DEFINE_string("glue", None, "GLUE's folders and files.")
IMAGES = flags.DEFINE_string("images", None, "CIFAR-10 as Parquet files.")
OUT = flags.DEFINE_string("out", None, "The new folder.")
SEED = 32
HELD_OUT = 2072  # the rows that `benchmarks.held_out` chooses rates by
FIRST = 30_000  # sentences of an order that other studies may have
SHOTS, SHOT_SEEDS = 150, (*range(5), 10, 11)  # images, and their seeds
# Training rows and scored ones of each network; a class's for images.
SENTENCES = {"minilm": (2400, 800), "smollm2": (1200, 400)}
PICTURES = (240, 60)
LAYERS = 8  # of SmolLM2
WORDS = (" negative", " positive")  # what SmolLM2 answers


def main() -> None:
  if not (GLUE.value and IMAGES.value and OUT.value):
    raise UserError("--glue, --images and --out are needed.")
  out = Path(OUT.value)
  write_texts(Path(GLUE.value) / "SST-2/train.tsv", out)
  (file,) = Path(IMAGES.value).glob("train*.parquet")
  write_images(file, out / "cifar10")
  write_base(resolve(SMOLLM2), out / "smollm2_base")


def unused_rows(count: int) -> np.ndarray:
  """Row numbers of a file of so many that no other study has."""
  order = np.random.default_rng(0).permutation(count)
  study = np.sort(order[HELD_OUT:])
  of_study = study[np.random.default_rng(0).permutation(len(study))]
  used = np.concatenate([order[:FIRST], of_study[:FIRST]])
  return np.setdiff1d(np.arange(count), used)


def write_texts(source: Path, out: Path) -> None:
  """Sentences with labels for MiniLM, prompts with answers for SmolLM2."""
  with source.open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  chosen = np.random.default_rng(SEED).permutation(unused_rows(len(rows)))
  for network, (train, dev) in SENTENCES.items():
    parts, chosen = np.split(chosen[: train + dev], [train]), chosen[train:]
    chosen = chosen[dev:]
    for split, part in zip(("train", "dev"), parts, strict=True):
      write_lines(
        out / network / f"{split}.jsonl", lines(network, rows, part.tolist())
      )


def lines(
  network: str, rows: Sequence[dict[str, str]], numbers: Sequence[int]
) -> Iterator[dict[str, str]]:
  for number in numbers:
    text, label = rows[number]["sentence"].strip(), rows[number]["label"]
    if network == "minilm":
      yield {"sentence": text, "label": label}
    else:
      prompt = f"Review: {text}\nSentiment:"
      yield {"prompt": prompt, "completion": WORDS[int(label)]}


def write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text, encoding="utf-8")


def write_images(source: Path, out: Path) -> None:
  """Two Parquet files, the scored images as a test split."""
  table = pq.read_table(source)
  labels = table.column("label").to_numpy().astype(np.int32)
  used = [
    draw_shots(labels, shots=SHOTS, dev_shots=1, seed=seed)[0]
    for seed in SHOT_SEEDS
  ]
  unused = np.setdiff1d(np.arange(len(labels)), np.concatenate(used))
  train, dev = PICTURES
  parts = draw_shots(labels[unused], shots=train, dev_shots=dev, seed=SEED)
  out.mkdir(parents=True, exist_ok=True)
  for split, part in zip(("train", "test"), parts, strict=True):
    pq.write_table(
      table.take(pa.array(unused[part])), out / f"{split}-00000.parquet"
    )


def write_base(source: Path, out: Path) -> None:
  """A copy of a model's folder whose config.json has fewer layers."""
  shutil.copytree(source, out, dirs_exist_ok=True)
  fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
  write_json(out / "config.json", fields | {"num_hidden_layers": LAYERS})


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
