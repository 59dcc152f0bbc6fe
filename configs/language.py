"""Your own texts to write like, in files: see docs/language.md.

  python -m experiments.language --config=configs/language.py \\
    --config.data.train=FILE.txt --config.model.name=FOLDER
  python -m experiments.language --config=configs/language.py \\
    --config.data.train=FILE.jsonl --config.data.text="('prompt','completion')"

A .txt file has a text per line, a .jsonl, .csv, .tsv or .parquet file columns.
On GPT-2 (124 M parameters, from the hub) unless config.model.name says
otherwise. Settings of our own, untuned: what to expect depends on the texts.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

# The query and value products, as each family of decoders names them.
TARGETS = ("query|q_proj", "value|v_proj")
INPUTS = ("mlp/c_proj|down_proj",)  # the feed-forward's last layer


def get_config() -> ConfigDict:
  config = common.get_config()
  config.task = "language"
  config.model.name = "gpt2"  # a hub id, or a folder

  data = config.data
  data.source = placeholder(str)  # has no use here
  data.train = placeholder(str)  # a file
  data.dev = placeholder(str)  # a file; unset: a part of the training rows
  data.dev_fraction = 0.1  # that part, taken by data.subset_seed
  data.text = ()  # a column, or those of prompts and completions; unset: found
  # a file of other texts, whose loss before and after says what was forgotten
  data.general = placeholder(str)
  data.skip_bad_rows = False  # go on without rows that can't be used
  data.cut = "right"  # where texts beyond max_length lose tokens: left | right
  data.separate = False  # an end-of-text token between prompt and completion

  config.optim.epochs = 3
  config.optim.batch_size = 8
  config.optim.label_smoothing = 0.0  # of training; scores are without it
  config.optim.head_lr = 0.0  # no head is trained
  config.eval_batch_size = 32
  config.vera.lr = 1e-2
  config.vera.rank = 256
  config.lora.lr = 1e-3
  common.put_on(config, TARGETS)
  config.ia3.targets = ("key|k_proj", "value|v_proj", *INPUTS)
  config.ia3.feedforward = INPUTS
  return config
