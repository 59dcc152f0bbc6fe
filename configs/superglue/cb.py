"""SuperGLUE's CB: three-way entailment of embedded clauses, 250 examples.

Scored by the mean of accuracy and macro F1, as SuperGLUE does.

  python -m experiments.glue --config=configs/superglue/cb.py          # base
  python -m experiments.glue --config=configs/superglue/cb.py:large
  python -m experiments.glue --config=configs/superglue/cb.py:minilm

No score to expect: the paper has none on SuperGLUE, and base and large were not
run by us, for want of RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs.superglue import superglue


def get_config(size: str = "base") -> ConfigDict:
  epochs = dict(base=160, large=80, minilm=20)
  return superglue("cb", size, epochs=epochs, max_length=256)
