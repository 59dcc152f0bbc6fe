"""VeRA and LoRA on GLUE, five seeds: the paper's Table 2.

  python -m experiments.sweep --config=configs/sweeps/glue.py:base --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/glue.py:large ...
  python -m experiments.sweep --config=configs/sweeps/glue.py:gain ...
  python -m experiments.sweep --config=configs/sweeps/glue.py:minilm ...
  python -m experiments.sweep --config=configs/sweeps/glue.py:cola ...

Six tasks with the settings of Table 8 for VeRA and of LoRA's own paper; the
median of each seed's best epoch. The paper copies its LoRA row, of which MRPC,
RTE and STS-B on RoBERTa-base start from an MNLI adapter: ours doesn't, so that
row is no fair target there. Expected: configs/TASK.py. Others, on average over
the six tasks: C3A's authors (Table 2) and RandLoRA's (Table 4), with other
protocols, report 1.5 to 2.5 points less; VB-LoRA's (Table 1), with the paper's
protocol and all linear layers adapted, 0.3 more. base and large were not run by
us, for want of RoBERTa's weights.

gain: RTE on RoBERTa-large with VeRA, LoRA and the head alone, for Figures 3
and 4.

minilm: SST-2 (2,000 training sentences, three epochs) and CoLA (3,000, four) in
batches of 16, five seeds, the head alone as well. cola: all of CoLA, five
epochs in batches of 32, three seeds, at twice the rates of configs/minilm.py.
"""

import importlib

from ml_collections import ConfigDict

from configs import common, minilm, rte
from configs.sweeps import (
  FEWER,
  SEEDS,
  cross,
  difference,
  product,
  seeds,
  sweep,
  zipped,
)

TASKS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
TITLE = "GLUE (the paper's Table 2)"


def get_config(size: str = "base") -> ConfigDict:
  if size == "minilm":
    return _minilm()
  if size == "cola":
    return _cola()
  common.pick(size, base={}, large={}, gain={}, minilm={}, cola={})
  if size == "gain":
    methods = product({"method": ("vera", "lora", "head")})
    title = "Gain on RTE (the paper's Figures 3 and 4)"
    runs = cross(methods, seeds(SEEDS))
    return sweep(title, rte.get_config("large"), runs)
  configs = [
    importlib.import_module(f"configs.{task}").get_config(size)
    for task in TASKS
  ]
  tasks = [difference(configs[0], config) for config in configs]
  methods = product({"method": ("vera", "lora")})
  return sweep(TITLE, configs[0], cross(tasks, methods, seeds(SEEDS)))


def _minilm() -> ConfigDict:
  base = minilm.brief()
  tasks = zipped(
    {
      "task": ("sst2", "cola"),
      "data.max_train_examples": (2000, 3000),
      "optim.epochs": (3, 4),
    }
  )
  methods = product({"method": ("vera", "lora", "head")})
  runs = cross(tasks, methods, seeds(SEEDS))
  return sweep(f"{TITLE}, MiniLM", base, runs, paper="roberta-base")


def _cola() -> ConfigDict:
  base = minilm.get_config("cola")
  base.optim.epochs = 5
  base.vera.lr, base.lora.lr = 2 * base.vera.lr, 2 * base.lora.lr
  runs = cross(product({"method": ("vera", "lora")}), seeds(FEWER))
  return sweep("CoLA, MiniLM", base, runs, paper="roberta-base")
