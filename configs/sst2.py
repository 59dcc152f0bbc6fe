"""SST-2: sentiment of film reviews. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/sst2.py          # RoBERTa-base
  python -m experiments.glue --config=configs/sst2.py:large    # RoBERTa-large

Expected, by the paper (Table 2, accuracy, median of five seeds' best epochs):
base 94.6 ± 0.1, large 96.1 ± 0.1. Not run by us, for want of RoBERTa's
weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=60, vera_lr=4e-3, head_lr=4e-3, lora_lr=5e-4),
    large=dict(epochs=10, vera_lr=1e-2, head_lr=6e-3, lora_lr=4e-4),
  )
  return common.glue("sst2", size, **column)
