"""SuperGLUE's RTE: textual entailment. The texts of GLUE's RTE, in other files.

Scored by accuracy. base and large have the paper's settings for RTE (Table 8).

  python -m experiments.glue --config=configs/superglue/rte.py          # base
  python -m experiments.glue --config=configs/superglue/rte.py:large
  python -m experiments.glue --config=configs/superglue/rte.py:minilm

The paper's RTE scores are GLUE's: see configs/rte.py. base and large were not
run by us, for want of RoBERTa's weights.
"""

from ml_collections import ConfigDict

from configs.superglue import superglue


def get_config(size: str = "base") -> ConfigDict:
  epochs = dict(base=160, large=40, minilm=5)
  length = 128 if size != "base" else 512  # as in configs/rte.py
  return superglue("rte", size, epochs=epochs, max_length=length)
