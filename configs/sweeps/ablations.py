"""What VeRA is made of: the paper's Tables 6 and 7.

  python -m experiments.sweep --config=configs/sweeps/ablations.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/ablations.py:minilm ...

RoBERTa-large, five seeds. MRPC and RTE: d_init in {1e-7, 0.1, 1.0}, the random
matrices' initialisers, only d or only b trained. Those and CoLA and STS-B: one
pair of matrices for all layers, or one for each. Orthogonal matrices are ours.
The report marks runs that collapsed to one class, whose d went to zero, or
whose loss was unstable. Expected, by the paper (mean of five): MRPC 90.5 as it
is, 70.3 with d_init 1.0 and 68.9 with uniform matrices, about the majority's
share; RTE 85.8, 60.3, 53.1. Not run by us, for want of RoBERTa's weights.

minilm: SST-2, 1,200 training sentences in batches of 16, three seeds, three
epochs.
"""

import importlib

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import (
  FEWER,
  SEEDS,
  Overrides,
  cross,
  difference,
  product,
  seeds,
  sweep,
)

TABLE_6 = ("mrpc", "rte")
TABLE_7 = ("mrpc", "rte", "cola", "stsb")
TITLE = "Ablations (the paper's Tables 6 and 7)"


def variants() -> Overrides:
  return (
    product({"vera.d_init": (1e-7, 0.1, 1.0)})
    + product({"vera.init": ("kaiming_normal", "uniform", "orthogonal")})
    + product({"vera.train": ("d", "b")})
  )


def sharing() -> Overrides:
  return product({"vera.sharing": ("shared", "unique")})


def get_config(size: str = "large") -> ConfigDict:
  if size == "minilm":
    base = minilm.brief()
    small = cross(variants() + sharing(), seeds(FEWER))
    return sweep(f"{TITLE}, MiniLM", base, small)
  common.pick(size, base={}, large={}, minilm={})
  configs = {
    task: importlib.import_module(f"configs.{task}").get_config(size)
    for task in TABLE_7
  }
  base = configs["mrpc"]
  tasks = {name: [difference(base, config)] for name, config in configs.items()}
  runs: Overrides = []
  for task in TABLE_6:
    runs += cross(tasks[task], variants(), seeds(SEEDS))
  for task in TABLE_7:
    runs += cross(tasks[task], sharing(), seeds(SEEDS))
  return sweep(TITLE, base, runs)
