"""The learning rates of the small studies: VeRA's and LoRA's, on two seeds.

  python -m experiments.sweep --config=configs/sweeps/rates.py --workdir=DIR

MiniLM, SST-2, 1,200 training sentences in batches of 16, three epochs, rates a
factor of two apart; the seeds are none of the studies'. What came out best for
each method is what `configs.minilm.BEST` has, and so what the small studies on
`minilm.brief` train with. The paper's studies have the paper's rates.
"""

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import cross, product, seeds, sweep

RATES = {
  "vera": (1e-2, 2e-2, 4e-2, 8e-2, 16e-2),
  "lora": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3),
}
OTHERS = (10, 11)  # seeds


def get_config(size: str = "minilm") -> ConfigDict:
  common.pick(size, minilm={})
  base = minilm.get_config("sst2")
  base.update_from_flattened_dict(minilm.BRIEF)
  runs = []
  for method, rates in RATES.items():
    runs += product({"method": (method,), "optim.adapter_lr": rates})
  return sweep("Learning rates, MiniLM", base, cross(runs, seeds(OTHERS)))
