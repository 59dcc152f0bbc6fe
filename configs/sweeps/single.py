"""One adapted layer, tiny data: convergence at equal parameters.

  python -m experiments.sweep --config=configs/sweeps/single.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/single.py:minilm ...

The value projection of the last layer alone, 128 training examples. VeRA's
r + width numbers equal LoRA's 2 * width * r at (width, 1) and (3 * width, 2).
Each method with three learning rates, a decade apart at the ends, so that none
is judged by a rate that suits another. The paper has no such run; its Appendix
E finds the two equally able to fit random matrices at equal numbers of
parameters. large: RTE on RoBERTa-large, not run by us.

minilm: SST-2, three seeds, the smaller pair of ranks alone.
"""

from ml_collections import ConfigDict

from configs import common, minilm, rte
from configs.sweeps import FEWER, SEEDS, cross, product, seeds, sweep

RATES = {
  "vera": (1e-2, 3e-2, 1e-1),
  "lora": (1e-3, 3e-3, 1e-2),
}
WIDTHS = {"minilm": 384, "base": 768, "large": 1024}
LAST = {"minilm": 5, "base": 11, "large": 23}


def get_config(size: str = "large") -> ConfigDict:
  common.pick(size, base={}, large={}, minilm={})
  base = minilm.get_config("sst2") if size == "minilm" else rte.get_config(size)
  width, last = WIDTHS[size], (f"layer_{LAST[size]}/.*/value",)
  base.model.scan = False
  base.vera.targets = base.lora.targets = last
  base.data.max_train_examples = 128
  base.optim.batch_size = 16
  base.optim.epochs = 12
  ranks: dict[str, tuple[int, ...]]
  ranks = {"vera": (width, 3 * width), "lora": (1, 2)}
  if size == "minilm":
    ranks = {"vera": (width,), "lora": (1,)}
  runs = []
  for method, rates in RATES.items():
    one = product({"method": (method,), f"{method}.rank": ranks[method]})
    lr = product({"optim.adapter_lr": rates})
    runs += cross(one, lr, seeds(FEWER if size == "minilm" else SEEDS))
  title = "One adapted layer, tiny data"
  if size == "minilm":
    title += ", MiniLM"
  return sweep(title, base, runs)
