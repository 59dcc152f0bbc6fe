"""Methods beside VeRA, each with the same effort of tuning.

MiniLM, SST-2, 1,200 training sentences in batches of 16, three epochs. First
the rates: two seeds and training and evaluation sentences that the study never
sees (`benchmarks.held_out` parts them). Every method has three rates a factor
of two apart, and as many more doublings as it takes until the score falls on
both sides of the best one, which `benchmarks.rates` says; RATES and then BEST
are written by that rule alone.

  python -m benchmarks.held_out --source=GLUE --out=PARTS
  python -m experiments.sweep --config=configs/sweeps/methods.py:rates \\
    --workdir=RATES --config.base.data.source=PARTS/rates
  python -m benchmarks.rates RATES
  python -m experiments.sweep --config=configs/sweeps/methods.py \\
    --workdir=DIR --config.base.data.source=PARTS/study

minilm: all methods, five seeds. cola: all of CoLA, five epochs in batches of
32, three seeds, VeRA, LoRA and the best four of SST-2 by their rates there.

On two cores at the 0.11 TFLOP/s that `--dry_run` assumes, the 88 runs of rates
take 1.4 core-hours and minilm 0.9; cola would take 2.5, so that it is left to
whoever has the time.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import (
  FEWER,
  SEEDS,
  Overrides,
  cross,
  seeds,
  sweep,
)

# Sizes beside VeRA's of configs/minilm.py, where a method has a choice.
SIZES: dict[str, Any] = {"unilora.size": 7680}  # as many numbers as VeRA's
# The first rates of each method; `benchmarks.rates` says which to add.
RATES = {
  "vera": (2e-2, 4e-2, 8e-2),
  "lora": (1e-3, 2e-3, 4e-3, 8e-3),
  "dora": (1e-3, 2e-3, 4e-3, 8e-3),
  "dvora": (1e-2, 2e-2, 4e-2, 8e-2),
  "ia3": (1e-2, 2e-2, 4e-2, 8e-2),
  "bitfit": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3),
  "lora_fa": (4e-3, 8e-3, 16e-3),
  "onelora": (1e-3, 2e-3, 4e-3, 8e-3),
  "pvera": (1e-2, 2e-2, 4e-2, 8e-2),
  "randlora": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
  "unilora": (5e-3, 1e-2, 2e-2, 4e-2),
}
# What the rule chose.
BEST = {
  "vera": 4e-2,
  "lora": 2e-3,
  "dora": 2e-3,
  "dvora": 4e-2,
  "ia3": 4e-2,
  "bitfit": 8e-3,
  "lora_fa": 8e-3,
  "onelora": 4e-3,
  "pvera": 2e-2,
  "randlora": 5e-4,
  "unilora": 2e-2,
}
COLA = ("vera", "lora", "dora", "dvora", "pvera", "ia3")
RATE_SEEDS = (10, 11)


def get_config(size: str = "minilm") -> ConfigDict:
  common.pick(size, minilm={}, rates={}, cola={})
  base = minilm.get_config("cola" if size == "cola" else "sst2")
  base.update_from_flattened_dict(SIZES)
  if size == "cola":
    base.optim.epochs = 5
    runs = cross(at_best(COLA), seeds(FEWER))
    return sweep("Methods on CoLA, MiniLM", base, runs)
  base.update_from_flattened_dict(minilm.BRIEF)
  if size == "rates":
    runs = [
      {"method": method, "optim.adapter_lr": rate}
      for method, rates in RATES.items()
      for rate in rates
    ]
    title = "Learning rates of the methods, MiniLM"
    return sweep(title, base, cross(runs, seeds(RATE_SEEDS)))
  runs = cross(at_best(RATES), seeds(SEEDS))
  return sweep("Methods beside VeRA, MiniLM", base, runs)


def at_best(methods: Any) -> Overrides:
  """Each method at its own rate."""
  return [
    {"method": method, "optim.adapter_lr": BEST[method]} for method in methods
  ]
