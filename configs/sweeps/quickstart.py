r"""A sweep for trying sweeps: generated data and the small encoder, no hub.

  python -m experiments.sweep --config=configs/sweeps/quickstart.py \
    --workdir=DIR

VeRA at two ranks, LoRA and the head alone, three seeds each, on the pairs of
`make quickstart`: no benchmark. notebooks/analysis.ipynb reads its results.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.sweeps import FEWER, cross, product, seeds, sweep


def get_config() -> ConfigDict:
  base = quickstart.get_config()
  base.data.max_train_examples = 1000
  methods = product({"method": ("lora", "head")})
  vera = product({"method": ("vera",), "vera.rank": (16, 256)})
  runs = cross(vera + methods, seeds(FEWER))
  return sweep("Generated entailment", base, runs)
