"""A small sweep for trying sweeps: VeRA at two ranks, LoRA, the head alone.

  python -m experiments.sweep --config=configs/sweeps/example.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/example.py:sst2 ...

On the small encoder, three seeds each. Without a variant it trains on the
generated pairs of `make quickstart`, which are no benchmark and need no
download. sst2: 1,000 training sentences, three epochs, a few minutes on two
cores; results/sweeps/example holds its results, which notebooks/analysis.ipynb
reads.
"""

from ml_collections import ConfigDict

from configs import common, minilm, quickstart
from configs.sweeps import FEWER, cross, product, seeds, sweep


def get_config(data: str = "generated") -> ConfigDict:
  common.pick(data, generated={}, sst2={})
  if data == "sst2":
    base = minilm.get_config("sst2")
    base.data.max_train_examples = 1000
  else:
    base = quickstart.get_config()
  vera = product({"method": ("vera",), "vera.rank": (16, 256)})
  others = product({"method": ("lora", "head")})
  runs = cross(vera + others, seeds(FEWER))
  return sweep("Example: MiniLM", base, runs)
