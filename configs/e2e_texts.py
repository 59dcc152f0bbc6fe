"""E2E's texts alone, character by character, on textgenrnn's LSTMs.

  python -m experiments.language --config=configs/e2e_texts.py \\
    --config.data.source=FOLDER

FOLDER has train.txt (or train.txt.gz) and valid.txt, as microsoft/LoRA's
examples/NLG/data/e2e has them. `make networks` writes networks/textgenrnn:
461,693 parameters, two LSTMs of 128 and an average by attention, which read the
last 40 characters. VeRA with r = 64 and LoRA with r = 2 are on the kernels of
all gates; `--config.method=head` trains the output layer alone. Scored in bits
per character of 200 texts of valid.txt, at the end; untrained the network has
2.4. Settings of our own.

Any other decoder can learn them too, whatever it splits texts into:
--config.model.name=MODEL with targets of its own.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, language

NETWORK = "./networks/textgenrnn"
FILES = ("train", "dev", "dev_fraction", "general")  # of other tasks
GATES = ("i[ifgo]", "h[ifgo]")  # of each LSTM


def get_config() -> ConfigDict:
  config = language.get_config()
  config.task = "e2e_texts"
  config.model.name = NETWORK
  data = config.data
  for name in (*FILES, "text", "cut", "separate"):
    del data[name]  # of the user's own texts
  data.max_length = 512  # characters; holds every text
  data.max_train_examples = 400
  data.max_eval_examples = 200  # of valid.txt; unset: all
  data.held_out = placeholder(int)  # inputs of train.txt in place of valid.txt

  optim = config.optim
  optim.epochs = 2
  optim.batch_size = 8
  optim.head_lr = placeholder(float)  # the method's own
  config.eval_epochs = optim.epochs
  config.vera.rank = 64
  # rates as configs/sweeps/networks.py:text_rates found them
  config.vera.lr, config.vera.head_lr = 0.16, 0.0  # no head is trained
  config.lora.rank = 2
  config.lora.alpha = 2.0
  config.lora.lr = 6.4e-2
  common.put_on(config, GATES)
  config.ia3.feedforward = ()
  config.head.head_lr = 6.4e-2
  config.bitfit.lr = 0.256
  config.full.lr = 2.56e-2
  return config
