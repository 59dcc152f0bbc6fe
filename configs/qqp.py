"""QQP: duplicate questions. Settings of our own.

  python -m experiments.glue --config=configs/qqp.py          # RoBERTa-base
  python -m experiments.glue --config=configs/qqp.py:large    # RoBERTa-large

The paper leaves QQP out for its cost; no expected score is known. VeRA's rates
are those that Table 8 gives to similar tasks, untuned; LoRA's rate and the
epochs are LoRA's own (its Table 9). Not run by us.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "base") -> ConfigDict:
  column = common.pick(
    size,
    base=dict(epochs=25, vera_lr=4e-3, head_lr=4e-3, lora_lr=5e-4),
    large=dict(epochs=20, vera_lr=1e-2, head_lr=2e-3, lora_lr=3e-4),
  )
  return common.glue("qqp", size, **column)
