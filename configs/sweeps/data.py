"""How much data does a method need? SST-2 on MiniLM, 32 to 8,192 sentences.

  python -m benchmarks.held_out --source=GLUE --out=PARTS --train=8192
  python -m experiments.sweep --config=configs/sweeps/data.py:rates \\
    --workdir=RATES --config.base.data.source=PARTS/rates

Every run has 1,024 steps of 8 sentences, so that a sentence is seen once of
8,192 and 256 times of 32, and is scored once, after its last step, on SST-2's
872. A seed draws the sentences, too. VeRA with r = 256, LoRA with r = 1 and 8
and LoRA-XS with r = 25 are on q and v; LoRA-XS has as many numbers there as
VeRA, 7,500 and 7,680. `full` trains all of the network.

rates: three rates a factor of two apart for each method, on other sentences, at
128 and at 8,192 of them; around the rule of docs/rates.md, 0.0123 for VeRA and
0.0013 for LoRA. A rate that is best at an end asks for the next one, as in
configs/sweeps/methods.py. The study takes the rate of the nearer size.

The study, whose runs come after, asks what limits VeRA at 8,192 sentences, too:
rank, or the fixed directions of A and B (other draws; a pair that Tied-LoRA
trained on CoLA, kept while d and b alone are trained), or optimisation (DVoRA).
Written before any of its runs:

- A pair trained on CoLA brings VeRA nearer to LoRA r = 8 than r = 1,024 does;
  r = 1,024 closes at least half of the gap; DVoRA closes it with hardly more
  numbers; other draws of A and B move the score by less than other seeds of
  training do.
- With 32 and 128 sentences the methods do not differ beyond their spread; from
  2,048 on, full fine-tuning is ahead of LoRA r = 8, and that of VeRA.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import Overrides, cross, sweep, zipped

STEPS, BATCH = 1024, 8
CHECKED = (128, 8192)  # sizes at which rates were tried
METHODS: dict[str, dict[str, object]] = {
  "vera": {"method": "vera", "vera.rank": 256},
  "lora 1": {"method": "lora", "lora.rank": 1},
  "lora 8": {"method": "lora", "lora.rank": 8},
  "lora_xs": {"method": "lora_xs", "lora_xs.rank": 25},
  "full": {"method": "full"},
}
RATES = {
  "vera": (0.006, 0.012, 0.024),
  "lora 1": (0.0007, 0.0014, 0.0028),
  "lora 8": (0.0007, 0.0014, 0.0028),
  "lora_xs": (0.001, 0.002, 0.004),
  "full": (1e-5, 2e-5, 4e-5),
}
RATE_SEED = 10


def get_config(part: str = "rates") -> ConfigDict:
  common.pick(part, rates={})
  base = minilm.get_config("sst2")
  base.optim.batch_size = BATCH
  base.eval_epochs = 1
  # each run has a rate of its own; its name depends on these as well
  base.vera.lr, base.lora.lr, base.lora_xs.lr = 1e-2, 1e-3, 1e-3
  base.full.lr, base.full.head_lr = 1e-5, base.head.head_lr
  runs: Overrides = [
    {**METHODS[name], **of_size(size), "optim.adapter_lr": rate}
    for size in CHECKED
    for name, rates in RATES.items()
    for rate in rates
  ]
  title = "Rates by size of the data, MiniLM"
  return sweep(title, base, cross(runs, both_seeds([RATE_SEED])))


def of_size(size: int) -> dict[str, int]:
  """So many sentences, for as many epochs as the steps take; scored once."""
  epochs = STEPS * BATCH // size
  return {
    "data.max_train_examples": size,
    "optim.epochs": epochs,
    "eval_epochs": epochs,
  }


def both_seeds(numbers: Sequence[int]) -> Overrides:
  """The same seed for the choice of sentences and for training."""
  return zipped({"seed": numbers, "data.subset_seed": numbers})
