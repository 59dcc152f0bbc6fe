"""The quickstart: generated entailment pairs on all-MiniLM-L6-v2.

  python -m experiments.glue --config=configs/quickstart.py

The data is made by experiments/make_entailment.py and is no benchmark: a score
on it says that training works. `make quickstart` runs this with VeRA and with a
head alone, and compares.
"""

from ml_collections import ConfigDict

from configs import minilm
from configs.common import of_ours


def get_config() -> ConfigDict:
  config = minilm.get_config("generated_entailment")
  config.data.source = of_ours("experiments/entailment")
  config.data.max_length = 64
  config.optim.epochs = 5
  config.vera.lr = 2e-2
  return config
