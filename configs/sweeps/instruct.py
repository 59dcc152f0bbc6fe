"""Instruction tuning: the paper's Table 4, and on SmolLM2 what can be shown.

  python -m experiments.sweep --config=configs/sweeps/instruct.py:llama_7b \\
    --workdir=DIR

llama_7b, llama_13b, llama2_7b, llama2_13b: VeRA and LoRA by
configs/instruct.py, one run each, whose answers to MT-Bench
`experiments.answer` writes for a judge. memory: Llama 7B with r = 64 for both
(Table 12), 100 steps each, three seeds one by one: seconds of a step, and the
peak of the device's memory. vicuna: Llama 7B with VeRA r = 256 on
10,000 rows (Table 13). Not run by us, for want of the weights.

  python -m experiments.sweep --config=configs/sweeps/instruct.py:rates \\
    --workdir=DIR/rates --config.base.data.source=FILE.json
  python -m experiments.sweep --config=configs/sweeps/instruct.py \\
    --workdir=DIR/study --config.base.data.source=FILE.json

smollm2: VeRA and DVoRA with r = 256 and LoRA with r = 8 on all linear layers of
SmolLM2-135M-Instruct but the head, 128 rows of FILE for one epoch in batches of
8, three seeds; each on the float32 weights and on the codes that the model's
file has in place of them. Scored on 100 held-out rows, of which 16 are
answered. Beside them the model as it is: a rate of 0 trains nothing, and VeRA
starts as the identity, so eight rows at that rate are enough.

rates: VeRA and LoRA over the same rates, doubled from 5e-4 to 0.512, and DVoRA
over five of them, 64 rows, one seed that the study has not; scored on 50 rows
that the study neither trains on nor scores. No answers are written.

Runs train one by one: a run's rows fill both cores. On two idle cores a step of
8 rows, 1,400 tokens, took 12.4 s, which is 113 tokens/s; with scoring, answers
and compiling a run of the study takes about 6.5 minutes and one of the rates 3.
In core-hours that is 4.2 for the study and 2.7 for the rates. On faster cores,
with a worker on each of two, a run of the study takes 5 minutes of a core and
one of the rates 2: 1.6 and 0.9.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, instruct, open_choices
from configs.sweeps import FEWER, Overrides, cross, product, seeds, sweep

TITLE = "Instructions (the paper's Table 4), SmolLM2"
ROWS = {"rates": 64, "smollm2": 128}
RATES = tuple(5e-4 * 2**k for k in range(11))  # up to 0.512
OTHER = 10  # a seed
# What of the paper's is trained: the model, and changes of its settings.
PAPER: dict[str, tuple[str, dict[str, Any]]] = {
  name: (name, {})
  for name in ("llama_7b", "llama_13b", "llama2_7b", "llama2_13b")
}
PAPER["memory"] = (
  "llama_7b",
  {"vera.rank": 64, "lora.rank": 64, "data.max_train_examples": 1600},
)
PAPER["vicuna"] = (
  "llama_7b",
  {"vera.rank": 256, "data.max_train_examples": 10_000},
)


def get_config(size: str = "smollm2") -> ConfigDict:
  common.pick(size, **dict.fromkeys((*ROWS, *PAPER), {}))
  if size in PAPER:
    model, changes = PAPER[size]
    base = instruct.get_config(model)
    base.update_from_flattened_dict(changes)
    numbers = open_choices.REPEATS if size == "memory" else open_choices.ONE
    pair = product({"method": ("vera", "lora")})
    title = f"Instructions (the paper's), {size}"
    config = sweep(title, base, cross(pair, seeds(numbers.value)))
    config.members = 1
    return config
  base = instruct.get_config("smollm2")
  base.data.max_train_examples = ROWS[size]
  if size == "rates":
    base.data.tune = True
    base.data.max_eval_examples = 50
    base.data.max_test_examples = 0
    base.seed = OTHER
    # each run has a rate of its own; its name depends on these as well
    base.vera.lr, base.lora.lr = 2e-2, 1e-3
    runs = product({"method": ("vera", "lora"), "optim.adapter_lr": RATES})
    runs += product({"method": ("dvora",), "optim.adapter_lr": RATES[4:9]})
  else:
    untuned = {"optim.adapter_lr": 0.0, "data.max_train_examples": 8}
    variants: Overrides = [
      {"method": "vera"},
      {"method": "dvora", "optim.adapter_lr": 0.016},  # best, as rates has it
      {"method": "lora"},
    ]
    whole = [untuned, *cross(variants, seeds(FEWER))]
    runs = whole + cross(whole, [{"model.quantise": "keep"}])
  config = sweep(f"{TITLE}: rates" if size == "rates" else TITLE, base, runs)
  config.members = 1
  return config
