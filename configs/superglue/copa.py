"""SuperGLUE's COPA: which of two texts is the cause, or effect, of a third.

Each choice is scored as a text of its own, and a soft-max over an example's two
scores is trained. Scored by accuracy; 400 examples.

  python -m experiments.glue --config=configs/superglue/copa.py          # base
  python -m experiments.glue --config=configs/superglue/copa.py:large
  python -m experiments.glue --config=configs/superglue/copa.py:minilm

No score to expect: the paper has none on SuperGLUE, and base and large were not
run by us, for want of RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs.superglue import superglue


def get_config(size: str = "base") -> ConfigDict:
  epochs = dict(base=160, large=80, minilm=20)
  return superglue("copa", size, epochs=epochs, max_length=256)
