"""Where each table and figure of the paper comes from: commands, weights, data.

`docs/reproduce.md` is made from this and from `vera_jax/report/published.py`.
"""

import importlib
from functools import cache
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Source(NamedTuple):
  """What a table or figure is made of.

  Attributes:
    shows: what it is, in a phrase.
    sweeps: names of sweeps, as "glue:base".
    weights: hub ids.
    data: what has to be there, and where it comes from.
    data_flag: how local data are named, where they don't come from the hub.
    after: a command between the sweep and its verdict, for each run.
  """

  shows: str
  sweeps: tuple[str, ...]
  weights: tuple[str, ...]
  data: str
  data_flag: str = ""
  after: str = ""


GLUE = "GLUE, `nyu-mll/glue` or a folder of its files"
ALPACA = "`yahma/alpaca-cleaned`, or its .json file"
LARGE = ("roberta-large",)
LLAMA_7B = ("huggyllama/llama-7b",)
IMAGES = ("cifar100", "food101", "flowers102", "resisc45")
# Answers of each run; a judge's scores of them come from FastChat.
ANSWERS = (
  "answer --adapter=DIR/…/runs/NAME/adapter"
  " --questions=question.jsonl --out=NAME.jsonl"
)

SOURCES = {
  "Table 2": Source(
    "GLUE, VeRA and LoRA",
    ("glue:base", "glue:large"),
    ("roberta-base", "roberta-large"),
    GLUE,
  ),
  "Table 3": Source(
    "E2E, VeRA and LoRA",
    ("e2e:medium", "e2e:large"),
    ("gpt2-medium", "gpt2-large"),
    "E2E in microsoft/LoRA's form: train.txt, valid.txt, test.txt; Java",
    "--config.base.data.source=FOLDER",
  ),
  "Table 4": Source(
    "MT-Bench, VeRA and LoRA",
    tuple(
      f"instruct:{name}"
      for name in ("llama_7b", "llama_13b", "llama2_7b", "llama2_13b")
    ),
    (
      *LLAMA_7B,
      "huggyllama/llama-13b",
      "meta-llama/Llama-2-7b-hf",
      "meta-llama/Llama-2-13b-hf",
    ),
    f"{ALPACA}; MT-Bench's question.jsonl; GPT-4 as the judge",
    after=ANSWERS,
  ),
  "Table 5": Source(
    "images, the head alone, full, LoRA and VeRA",
    tuple(f"images:{n}_{size}" for size in ("base", "large") for n in IMAGES),
    (
      "google/vit-base-patch16-224-in21k",
      "google/vit-large-patch16-224-in21k",
    ),
    "the four data sets of configs/images, from the hub or as class folders",
  ),
  "Table 6": Source("ablations", ("ablations:large",), LARGE, GLUE),
  "Table 7": Source(
    "one pair of matrices, or one for each layer",
    ("ablations:large",),
    LARGE,
    GLUE,
  ),
  "Table 12": Source(
    "time and memory of instruction tuning",
    ("instruct:memory",),
    LLAMA_7B,
    f"{ALPACA}; a device that says its peak of memory",
  ),
  "Table 13": Source(
    "Vicuna's questions, VeRA and LoRA",
    ("instruct:vicuna",),
    LLAMA_7B,
    f"{ALPACA}; Vicuna's question.jsonl; GPT-4 as the judge",
    after=ANSWERS,
  ),
  "Figure 2": Source("score by rank", ("rank:large",), LARGE, GLUE),
  "Figure 3": Source("norms of d by layer", ("glue:gain",), LARGE, GLUE),
  "Figure 4": Source("gain per parameter", ("glue:gain",), LARGE, GLUE),
}


# Of which sweeps how many runs `experiments.rehearse --small` has taken to
# their verdicts.
REHEARSED = {
  "all runs": (
    *("glue:gain", "e2e:medium", "images:cifar100_base"),
    *("instruct:memory", "instruct:vicuna"),
  ),
  "one run": (
    *("glue:base", "glue:large", "e2e:large"),
    *("instruct:llama_7b", "instruct:llama_13b"),
    *("instruct:llama2_7b", "instruct:llama2_13b"),
    *("images:food101_base", "images:flowers102_base", "images:resisc45_base"),
    *("images:cifar100_large", "images:food101_large"),
    *("images:flowers102_large", "images:resisc45_large"),
    "ablations:large",
  ),
  "four runs": ("rank:large",),
}


def load(name: str) -> ConfigDict:
  """A sweep's config by its name, as "glue:base"."""
  study, _, variant = name.partition(":")
  module = importlib.import_module(f"configs.sweeps.{study}")
  config: ConfigDict = module.get_config(variant)
  return config


@cache
def planned(table: str) -> tuple[dict[str, Any], ...]:
  """The configs of the runs that a table or figure is made of."""
  configs = []
  for name in SOURCES[table].sweeps:
    sweep = load(name)
    for overrides in sweep.overrides:
      config = sweep.base.copy_and_resolve_references()
      config.update_from_flattened_dict(dict(overrides))
      configs.append(config.to_dict())
  return tuple(configs)
