"""SuperGLUE's WiC: whether a word has the same sense in two sentences.

The word stands in front of the first sentence. Scored by accuracy.

  python -m experiments.glue --config=configs/superglue/wic.py          # base
  python -m experiments.glue --config=configs/superglue/wic.py:large
  python -m experiments.glue --config=configs/superglue/wic.py:minilm

No score to expect: the paper has none on SuperGLUE, and base and large were not
run by us, for want of RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs.superglue import superglue


def get_config(size: str = "base") -> ConfigDict:
  epochs = dict(base=60, large=30, minilm=5)
  return superglue("wic", size, epochs=epochs, max_length=128)
