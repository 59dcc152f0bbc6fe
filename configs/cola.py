"""CoLA: grammatical acceptability. The paper's settings (Table 8).

  python -m experiments.glue --config=configs/cola.py          # RoBERTa-base
  python -m experiments.glue --config=configs/cola.py:large    # RoBERTa-large

Expected, by the paper (Table 2, Matthews correlation, median of five seeds'
best epochs): base 65.6 ± 0.8, large 68.0 ± 0.8. Not run by us, for want of
RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=80, vera_lr=1e-2, head_lr=1e-2, lora_lr=4e-4),
    large=dict(epochs=40, vera_lr=1e-2, head_lr=6e-3, lora_lr=2e-4),
  )
  return common.glue("cola", size, **column)
