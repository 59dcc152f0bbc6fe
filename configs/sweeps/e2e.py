"""E2E: the paper's Table 3, and in small on SmolLM2.

  python -m experiments.sweep --config=configs/sweeps/e2e.py:medium \\
    --workdir=DIR --config.base.data.source=FOLDER
  python -m experiments.sweep --config=configs/sweeps/e2e.py:large ...
  python -m experiments.sweep --config=configs/sweeps/e2e.py:rates \\
    --workdir=DIR/rates --config.base.data.source=FOLDER
  python -m experiments.sweep --config=configs/sweeps/e2e.py --workdir=DIR ...

medium, large: VeRA and LoRA on GPT-2 by configs/e2e.py, three seeds. Not run by
us, for want of GPT-2's weights.

FOLDER has E2E's train.txt (or train.txt.gz), valid.txt and test.txt.

smollm2: VeRA with r = 256 and 1024 and LoRA with r = 8 on the queries and
values of SmolLM2-135M, 600 training rows for one epoch in batches of 8, three
seeds; 100 of the 630 test inputs, drawn by data.subset_seed, answered with
beam 10. Beside them the model as it is, once asked as the tuned ones are and
once as a chat model is. A rate of 0 trains nothing: VeRA starts as the
identity, so eight rows at that rate are enough.

rates: each method's learning rate, 200 rows, one seed that the study has not;
the highest token_probability on the first texts of 100 inputs of train.txt that
are kept from training, here as in the study. What came out best is what
configs/e2e.py has for smollm2.

Runs train one by one: on two CPU cores three together had 125 tokens/s, one
alone 183.
"""

from ml_collections import ConfigDict

from configs import common, e2e, open_choices
from configs.sweeps import FEWER, Overrides, cross, product, seeds, sweep

TITLE = "E2E (the paper's Table 3), SmolLM2"
ROWS = {"rates": 200, "smollm2": 600}
METHODS: Overrides = [
  {"method": "vera", "vera.rank": 256},
  {"method": "vera", "vera.rank": 1024},
  {"method": "lora"},
]
RATES = {"vera": (2e-2, 6e-2, 2e-1, 6e-1), "lora": (1e-3, 3e-3, 1e-2, 3e-2)}
OTHER = 10  # a seed
CHAT = (
  "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by"
  " Hugging Face<|im_end|>\n<|im_start|>user\nWrite one sentence about a"
  " restaurant from these facts: {}<|im_end|>\n<|im_start|>assistant\n"
)


def get_config(size: str = "smollm2") -> ConfigDict:
  common.pick(size, **dict.fromkeys((*ROWS, *e2e.SIZES), {}))
  if size in e2e.SIZES:
    repeats = seeds(open_choices.REPEATS.value)
    pair = product({"method": ("vera", "lora")})
    title = f"E2E (the paper's Table 3), GPT-2 {size}"
    return sweep(title, e2e.get_config(size), cross(pair, repeats))
  base = e2e.get_config("smollm2")
  base.data.max_train_examples = ROWS[size]
  if size == "rates":
    base.data.test = False
    base.vera.lr, base.lora.lr = 4e-2, 4e-3  # each run has another one
    base.seed = OTHER
    runs = [
      run
      for method in METHODS
      for run in cross(
        [method], product({"optim.adapter_lr": RATES[method["method"]]})
      )
    ]
  else:
    untuned = {"optim.adapter_lr": 0.0, "data.max_train_examples": 8}
    chat = {"data.prompt": CHAT, "data.separate": False}
    runs = [untuned, untuned | chat, *cross(METHODS, seeds(FEWER))]
  config = sweep(f"{TITLE}: rates" if size == "rates" else TITLE, base, runs)
  config.members = 1
  return config
