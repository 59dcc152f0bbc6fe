"""How the random pair is drawn, the paper's second open question.

MiniLM, SST-2, 1,200 training sentences in batches of 16, three epochs: VeRA
with every matrix of docs/initialisation.md that has the paper's second moments,
at r in {64, 256, 1024}, five seeds. The learning rates by the rule of
configs/sweeps/methods.py, on two seeds and sentences of their own: three a
factor of two apart for each matrix at r = 256, and as many more as
`benchmarks.rates` asks for. A matrix's rate then serves all of its ranks: all
matrices have the same second moments, so that what rank changes of the best
rate, it changes for all of them alike.

  python -m benchmarks.held_out --source=GLUE --out=PARTS
  python -m experiments.sweep --config=configs/sweeps/initialisers.py:rates \\
    --workdir=RATES --config.base.data.source=PARTS/rates
  python -m benchmarks.rates RATES
  python -m experiments.sweep --config=configs/sweeps/initialisers.py \\
    --workdir=DIR --config.base.data.source=PARTS/study

RATES and then BEST below are written by the rule alone.

All of these runs have one projection seed, so that each matrix is drawn once.
draws: the matrices of DRAWN at the same ranks, five draws, each with a training
seed of its own.

On two cores at the 0.11 TFLOP/s that `--dry_run` assumes, the rates take 0.8
core-hours (46 runs) and minilm 2.1 (105 runs); on faster cores about half.
"""

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import (
  SEEDS,
  Overrides,
  cross,
  product,
  seeds,
  sweep,
  zipped,
)
from configs.sweeps.methods import RATE_SEEDS

RANKS = 64, 256, 1024
DRAWN = "kaiming_uniform", "sparse_third", "sparse_root", "structured"
# The first rates of each matrix; `benchmarks.rates` says which to add.
RATES = {
  "kaiming_uniform": (2e-2, 4e-2, 8e-2),
  "kaiming_normal": (1e-2, 2e-2, 4e-2, 8e-2),
  "rademacher": (2e-2, 4e-2, 8e-2),
  "sparse_third": (2e-2, 4e-2, 8e-2),
  "sparse_root": (1e-2, 2e-2, 4e-2, 8e-2),
  "orthogonal": (2e-2, 4e-2, 8e-2),
  "structured": (2e-2, 4e-2, 8e-2),
}
# What the rule chose.
BEST = {
  "kaiming_uniform": 4e-2,
  "kaiming_normal": 2e-2,
  "rademacher": 4e-2,
  "sparse_third": 4e-2,
  "sparse_root": 2e-2,
  "orthogonal": 4e-2,
  "structured": 4e-2,
}


def get_config(size: str = "minilm") -> ConfigDict:
  common.pick(size, minilm={}, rates={}, draws={})
  base = minilm.get_config("sst2")
  base.update_from_flattened_dict(minilm.BRIEF)
  if size == "rates":
    runs: Overrides = [
      {"vera.init": init, "optim.adapter_lr": rate}
      for init, rates in RATES.items()
      for rate in rates
    ]
    title = "Learning rates of VeRA's matrices, MiniLM"
    return sweep(title, base, cross(runs, seeds(RATE_SEEDS)))
  matrices: Overrides = [
    {"vera.init": init, "optim.adapter_lr": rate} for init, rate in BEST.items()
  ]
  if size == "draws":
    drawn = [one for one in matrices if one["vera.init"] in DRAWN]
    each = zipped({"seed": [*SEEDS], "vera.projection_seed": [*SEEDS]})
    runs = cross(drawn, each)  # at the base's rank, 256
    runs += cross(runs, product({"vera.rank": (64, 1024)}))
    return sweep("Draws of VeRA's matrices, MiniLM", base, runs)
  ranks = product({"vera.rank": RANKS})
  runs = cross(matrices, ranks, seeds(SEEDS))
  return sweep("VeRA's random matrices, MiniLM", base, runs)
