"""VeRA with other methods, the paper's open question, at equal counts.

MiniLM, SST-2, the sizes, the parts of the data and the rule for rates of
configs/sweeps/methods.py, which has the commands; here they are

  python -m experiments.sweep --config=configs/sweeps/combinations.py:rates \\
    --workdir=RATES --config.base.data.source=PARTS/rates
  python -m experiments.sweep --config=configs/sweeps/combinations.py \\
    --workdir=DIR --config.base.data.source=PARTS/study

minilm, five seeds: VeRA alone, DVoRA, VeRA with IA3 on keys and values, and
VeRA with the biases of its own layers (PEFT's bias="vera_only") have 12,288
trained numbers each. A chain trains both of its methods at one rate.

On two cores at 0.11 TFLOP/s the rates take 0.5 core-hours and minilm 0.4.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import SEEDS, cross, seeds, sweep
from configs.sweeps.methods import RATE_SEEDS

NUMBERS = 12_288  # trained by each of them
IA3 = {"ia3.targets": ("key", "value"), "ia3.feedforward": ()}
BITFIT = {"bitfit.biases": "query|value"}
FOUR = 5e-3, 1e-2, 2e-2, 4e-2
# Rows: the method, its settings, its first rates.
ROWS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
  "vera": ("vera", {"vera.rank": 640}, (2e-2, 4e-2, 8e-2)),
  "dvora": ("dvora", {"vera.rank": 256}, (2e-2, 4e-2, 8e-2)),
  "ia3": ("vera+ia3", {"vera.rank": 256, **IA3}, (2e-2, 4e-2, 8e-2)),
  "bitfit": ("vera+bitfit", {"vera.rank": 256, **BITFIT}, FOUR),
}
# What the rule chose.
BEST = {"vera": 4e-2, "dvora": 4e-2, "ia3": 4e-2, "bitfit": 1e-2}


def get_config(size: str = "minilm") -> ConfigDict:
  common.pick(size, minilm={}, rates={})
  base = minilm.get_config("sst2")
  base.update_from_flattened_dict(minilm.BRIEF)
  runs = []
  for name, (method, settings, rates) in ROWS.items():
    one = {"method": method, **settings}
    for rate in rates if size == "rates" else (BEST[name],):
      runs.append({**one, "optim.adapter_lr": rate})
  if size == "rates":
    title = "Learning rates of VeRA's combinations, MiniLM"
    return sweep(title, base, cross(runs, seeds(RATE_SEEDS)))
  title = "VeRA's combinations, MiniLM"
  return sweep(title, base, cross(runs, seeds(SEEDS)))
