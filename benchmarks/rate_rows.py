"""The rows of the study of the rule for the rate, which no other study has.

  python -m benchmarks.rate_rows GLUE CIFAR10 ROWS

GLUE and CIFAR10 are the folders of the other studies. SST-2: sentences that are
neither among the first 30,000 by `data.subset_seed` 0 of the training file nor
of the part of it that `benchmarks.held_out` leaves to studies. CIFAR-10:
training images that are not the first 150 of their class by any seed that the
studies of images have. Drawn once, from seed 32."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments import cli
from vera_jax.data.image_files import draw_shots
from vera_jax.errors import UserError

SEED = 32
HELD_OUT = 2072  # the rows that `benchmarks.held_out` chooses rates by
FIRST = 30_000  # sentences of an order that other studies may have
SHOTS, SHOT_SEEDS = 150, (*range(5), 10, 11)  # images, and their seeds
# Training rows and scored ones of each network; a class's for images.
SENTENCES = {"minilm": (2400, 800), "smollm2": (600, 200)}
PICTURES = (240, 60)
WORDS = 5, 12  # of a sentence that SmolLM2 learns to write


def main(words: list[str]) -> None:
  if len(words) != 3:
    raise UserError("Name GLUE's folder, that of CIFAR-10, and the new one.")
  glue, images, out = map(Path, words)
  write_texts(glue / "SST-2/train.tsv", out)
  (file,) = images.glob("train*.parquet")
  write_images(file, out / "cifar10")


def unused_rows(count: int) -> np.ndarray:
  """Row numbers of a file of so many that no other study has."""
  order = np.random.default_rng(0).permutation(count)
  study = np.sort(order[HELD_OUT:])
  of_study = study[np.random.default_rng(0).permutation(len(study))]
  used = np.concatenate([order[:FIRST], of_study[:FIRST]])
  return np.setdiff1d(np.arange(count), used)


def write_texts(source: Path, out: Path) -> None:
  """Sentences with labels for MiniLM, short ones alone for SmolLM2."""
  with source.open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  chosen = np.random.default_rng(SEED).permutation(unused_rows(len(rows)))
  lines = [
    {"sentence": rows[i]["sentence"].strip(), "label": rows[i]["label"]}
    for i in chosen.tolist()
  ]
  first = sum(SENTENCES["minilm"])
  texts = [
    {"text": line["sentence"]}
    for line in lines[first:]
    if WORDS[0] <= len(line["sentence"].split()) <= WORDS[1]
  ]
  for network, all_lines in (("minilm", lines), ("smollm2", texts)):
    train, dev = SENTENCES[network]
    write_lines(out / network / "train.jsonl", all_lines[:train])
    write_lines(out / network / "dev.jsonl", all_lines[train : train + dev])


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
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


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
