"""QNLI: does a sentence answer a question. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/qnli.py          # RoBERTa-base
  python -m experiments.glue --config=configs/qnli.py:large    # RoBERTa-large

Expected, by the paper (Table 2, accuracy, median of five seeds' best epochs):
base 91.8 ± 0.2, large 94.4 ± 0.2. Not run by us, for want of RoBERTa's
weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=25, vera_lr=1e-2, head_lr=4e-3, lora_lr=4e-4),
    large=dict(epochs=20, vera_lr=1e-2, head_lr=2e-4, lora_lr=2e-4),
  )
  return common.glue("qnli", size, **column)
