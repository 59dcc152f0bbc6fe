"""SuperGLUE's BoolQ: yes-no questions about a passage. Scored by accuracy.

  python -m experiments.glue --config=configs/superglue/boolq.py          # base
  python -m experiments.glue --config=configs/superglue/boolq.py:large
  python -m experiments.glue --config=configs/superglue/boolq.py:minilm

No score to expect: the paper has none on SuperGLUE, and base and large were not
run by us, for want of RoBERTa's weights. Passages are cut at 256 tokens.
"""

from ml_collections import ConfigDict

from configs.superglue import superglue


def get_config(size: str = "base") -> ConfigDict:
  epochs = dict(base=30, large=20, minilm=3)
  return superglue("boolq", size, epochs=epochs, max_length=256)
