"""STS-B: similarity of sentences, 0 to 5. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/stsb.py          # RoBERTa-base
  python -m experiments.glue --config=configs/stsb.py:large    # RoBERTa-large

Expected, by the paper (Table 2, Pearson correlation, median of five seeds'
best epochs): base 90.7 ± 0.2, large 91.7 ± 0.8. Not run by us, for want of
RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=80, vera_lr=1e-2, head_lr=1e-2, lora_lr=4e-4),
    large=dict(epochs=20, vera_lr=2e-2, head_lr=2e-3, lora_lr=2e-4),
  )
  return common.glue("stsb", size, **column)
