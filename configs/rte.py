"""RTE: textual entailment. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/rte.py          # RoBERTa-base
  python -m experiments.glue --config=configs/rte.py:large    # RoBERTa-large

Expected, by the paper (Table 2, accuracy, median of five seeds' best epochs):
base 78.7 ± 0.7, large 85.9 ± 0.7. Not run by us, for want of RoBERTa's
weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=160, vera_lr=4e-3, head_lr=1e-2, lora_lr=5e-4),
    large=dict(epochs=40, vera_lr=2e-2, head_lr=2e-3, lora_lr=4e-4),
  )
  return common.glue("rte", size, **column)
