"""MRPC: paraphrase of news sentences. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/mrpc.py          # RoBERTa-base
  python -m experiments.glue --config=configs/mrpc.py:large    # RoBERTa-large

Expected, by the paper (Table 2, accuracy, median of five seeds' best epochs):
base 89.5 ± 0.5, large 90.9 ± 0.7. Not run by us, for want of RoBERTa's
weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=30, vera_lr=1e-2, head_lr=4e-3, lora_lr=4e-4),
    large=dict(epochs=40, vera_lr=3e-2, head_lr=3e-3, lora_lr=3e-4),
  )
  return common.glue("mrpc", size, **column)
