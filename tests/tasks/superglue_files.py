"""Small data sets in the form that SuperGLUE ships: one folder per task."""

import json
from pathlib import Path

import numpy as np

WORDS = [f"word{i}" for i in range(20)]
SPLITS = {"train": 24, "val": 12, "test": 6}


def write_superglue(folder: Path, *, seed: int = 0) -> Path:
  """All five tasks. The answer is in the texts: the last word says it.

  CB's hypothesis ends in a word for its class, COPA's right choice in word20;
  in the three others word21 ends the true examples, word20 the rest.
  """
  rng = np.random.default_rng(seed)

  def words(n: int) -> str:
    return " ".join(rng.choice(WORDS, n))

  def row(task: str, label: int) -> dict:
    end = f"word{20 + label}"
    names: tuple[str, ...]
    if task == "CB":
      names = ("entailment", "contradiction", "neutral")
      texts = {"premise": words(4), "hypothesis": f"{words(1)} {end}"}
      return {**texts, "label": names[label]}
    if task == "COPA":
      right, wrong = f"{words(1)} word20", f"{words(1)} word21"
      choices = (wrong, right) if label else (right, wrong)
      names = ("choice1", "choice2")
      question = str(rng.choice(["cause", "effect"]))
      pair = dict(zip(names, choices, strict=True))
      return {"premise": words(2), **pair, "question": question, "label": label}
    if task == "RTE":
      names = ("entailment", "not_entailment")
      texts = {"premise": words(3), "hypothesis": f"{words(1)} {end}"}
      return {**texts, "label": names[label]}
    if task == "BoolQ":
      texts = {"question": words(2), "passage": f"{words(5)} {end}"}
      return {**texts, "label": bool(label)}
    word = words(1)
    texts = {"sentence1": f"{words(2)} {word}", "sentence2": f"{word} {end}"}
    places = {"start1": 12, "end1": 17, "start2": 0, "end2": 5, "version": 1.1}
    return {"word": word, **texts, **places, "label": bool(label)}

  for task in ("BoolQ", "CB", "COPA", "RTE", "WiC"):
    (folder / task).mkdir(parents=True)
    classes = 3 if task == "CB" else 2
    for split, count in SPLITS.items():
      lines = []
      for i in range(count):
        found = {**row(task, int(rng.integers(classes))), "idx": i}
        if split == "test":
          found = {**found, "idx": 100 + i}
          del found["label"]
        lines.append(json.dumps(found) + "\n")
      (folder / task / f"{split}.jsonl").write_text("".join(lines))
  return folder
