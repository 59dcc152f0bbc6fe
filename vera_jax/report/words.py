"""The words of figures and of tables in papers, for names out of settings."""

import re

from vera_jax.errors import UserError
from vera_jax.tasks.task import task_named

# Of tasks that are known by their data: images:NAME is "images in NAME".
KINDS = {
  "e2e": "E2E",
  "e2e_texts": "E2E's texts",
  "images": "images",
  "instruct": "instructions",
  "language": "texts",
  "text": "texts",
}
METRIC = {
  "accuracy": "accuracy",
  "micro_f1": "micro F1",
  "entity_f1": "entity F1",
  "accuracy_f1": "mean of accuracy and F1",
  "matthews": "Matthews correlation",
  "pearson": "Pearson correlation",
  "token_probability": "token probability",
  "BLEU": "BLEU (%)",
  "NIST_perl": "NIST by the Perl script's rule",
  "METEOR": "METEOR (%)",
  "ROUGE_L": "ROUGE-L (%)",
}
# Settings in conditions' names, as sentences have them.
WORDS = {
  "adapter_lr": "learning rate",
  "head_lr": "head's learning rate",
  "d_init": "d starts at",
  "init": "",
  "train": "trained:",
  "targets": "",
  "shots": "examples per class:",
  "eval_epochs": "epochs between evaluations:",
  "separate": "end of text behind it:",
  "subset_seed": "drawing",
  "projection_seed": "drawing",
}


def task_title(name: str) -> str:
  """A task as its benchmark writes it (SST-2), or its kind and its data."""
  try:
    return task_named(name).presentation.title or name
  except UserError:
    kind, _, data = name.partition(":")
    title = KINDS.get(kind, kind)
    return f"{title} in {data}".replace("_", " ") if data else title


def metric_title(name: str) -> str:
  return METRIC.get(name, name)


def words(condition: str) -> str:
  """A condition's name in words: "init sparse_root" is "sparse root"."""
  parts = []
  for part in condition.split(", "):
    name, _, value = part.partition(" ")
    name = WORDS.get(name, name)
    value = {"True": "yes", "False": "no"}.get(value, value)
    value = value.replace("_", " ") if re.fullmatch(r"\w+", value) else value
    parts.append(f"{name.replace('_', ' ')} {value}".strip())
  return ", ".join(parts)
