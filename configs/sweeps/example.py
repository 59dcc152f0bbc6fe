"""A small sweep for trying sweeps: VeRA at two ranks, LoRA, the head alone.

  python -m experiments.sweep --config=configs/sweeps/example.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/example.py:sst2 ...

On the small encoder, three seeds each. Without a variant it trains on the
generated pairs of `make quickstart`, which are no benchmark and need no
download. sst2: 1,200 training sentences, three epochs, without the head alone;
results/sweeps/example has its results and one adapter, which
notebooks/analysis.ipynb reads. text: on your own texts
(--config.base.data.train=FILE; docs/own_data.md).
"""

from ml_collections import ConfigDict

from configs import common, minilm, quickstart, text
from configs.sweeps import FEWER, cross, product, seeds, sweep


def get_config(data: str = "generated") -> ConfigDict:
  common.pick(data, generated={}, sst2={}, text={})
  if data == "sst2":
    base = minilm.brief()
  elif data == "text":
    base = text.get_config()
  else:
    base = quickstart.get_config()
  vera = product({"method": ("vera",), "vera.rank": (16, 256)})
  methods = ("lora",) if data == "sst2" else ("lora", "head")
  others = product({"method": methods})
  runs = cross(vera + others, seeds(FEWER))
  return sweep("Example: MiniLM", base, runs)
