"""Study 2: score against trained parameters, by rank: the paper's Figure 2.

  python -m experiments.sweep --config=configs/sweeps/rank.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/rank.py:minilm ...

RTE on RoBERTa-large: VeRA with r in {1, 4, 16, 64, 256, 1024}, LoRA with r in
{1, 2, 4, ..., 64}, five seeds. LoRA's alpha stays as it is while r changes, as
its own paper does it. Expected: the figure's claim is that at equal numbers of
parameters VeRA is four points above LoRA; its values are not printed anywhere.
Not run by us, for want of RoBERTa's weights.

minilm: SST-2, 1,200 training sentences in batches of 16, three seeds, three
epochs; every second of LoRA's ranks.
"""

from ml_collections import ConfigDict

from configs import common, minilm, rte
from configs.sweeps import FEWER, SEEDS, cross, product, seeds, sweep

VERA = (1, 4, 16, 64, 256, 1024)
LORA = (1, 2, 4, 8, 16, 32, 64)


def get_config(size: str = "large") -> ConfigDict:
  common.pick(size, base={}, large={}, minilm={})
  small = size == "minilm"
  vera = product({"method": ("vera",), "vera.rank": VERA})
  lora = product({"method": ("lora",), "lora.rank": LORA[:: 1 + small]})
  runs = cross(vera + lora, seeds(FEWER if small else SEEDS))
  if small:
    title = "Rank (the paper's Figure 2), MiniLM"
    return sweep(title, minilm.brief(), runs)
  return sweep("Rank (the paper's Figure 2)", rte.get_config(size), runs)
