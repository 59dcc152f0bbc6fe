"""How much data does a method need? SST-2 on MiniLM, 16 to 4,096 sentences.

  python -m benchmarks.held_out --source=GLUE --out=parts --train=4096
  python -m experiments.sweep --config=configs/sweeps/data.py:rates \\
    --workdir=RATES --config.base.data.source=parts/rates
  python -m experiments.sweep --config=configs/sweeps/data.py \\
    --workdir=DIR --config.base.data.source=parts/study
  python -m benchmarks.data_curve DIR LIMITS FOLDER

Every run has 512 steps of 8 sentences, so that a sentence is seen once of 4,096
and 256 times of 16, and is scored once, after its last step, on SST-2's 872. A
seed draws the sentences, too. VeRA with r = 256, LoRA with r = 1 and 8 and
LoRA-XS with r = 25 are on q and v; LoRA-XS has as many numbers there as VeRA,
7,500 and 7,680. `full` trains all of the network.

rates: three rates a factor of two apart for each method, on other sentences, at
64 and at 4,096 of them; around the rule of docs/rates.md, 0.0175 for VeRA and
0.0018 for LoRA. A rate that is best at an end asks for the next one, as in
configs/sweeps/methods.py. The study takes the rate of the nearer size.

What limits VeRA at 4,096 sentences: rank, the fixed directions of A and B, or
optimisation?

  ... --config=configs/sweeps/data.py:pairs --workdir=PAIRS \\
    --config.base.data.source=GLUE
  ... --config=configs/sweeps/data.py:own_pairs --workdir=OWN_PAIRS \\
    --config.base.data.source=parts/rates
  ... --config=configs/sweeps/data.py:limit_rates --workdir=LIMIT_RATES \\
    --config.base.data.source=parts/rates
  ... --config=configs/sweeps/data.py:limits --workdir=LIMITS \\
    --config.base.data.source=parts/study

pairs: Tied-LoRA, r = 256, on CoLA, for a pair A, B that VeRA keeps. On 4,096
sentences, 512 steps of 8, every run gave one and the same answer to all; hence
five epochs of all sentences, 32 per step, beside them.
own_pairs: the same on SST-2's other sentences, an upper bound for what a pair
of another task can do.
limit_rates: rates of DVoRA, and of VeRA on either pair. The best runs' adapters
were copied: `cp -r PAIRS/runs/BEST/adapter parts/pair_cola` and
`cp -r OWN_PAIRS/runs/BEST/adapter parts/pair_sst2`.
limits: r = 1,024; DVoRA; another draw of A and B; either pair.

Written before any of these runs:

- A pair trained on CoLA brings VeRA nearer to LoRA r = 8 than r = 1,024 does;
  r = 1,024 closes at least half of the gap; DVoRA closes it with hardly more
  numbers; another draw of A and B moves the score by less than another seed of
  training does.
- A pair trained on other sentences of SST-2 itself brings VeRA to LoRA r = 8 at
  the least, and the pair from CoLA half as far. (Written before any run
  with a trained pair.)
- With 16 and 64 sentences the methods do not differ beyond their spread; from
  1,024 on, full fine-tuning is ahead of LoRA r = 8, and that of VeRA.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import common, minilm
from configs.sweeps import FEWER, Overrides, cross, sweep

STEPS, BATCH = 512, 8
SIZES = (16, 64, 256, 1024, 4096)
CHECKED = (64, 4096)  # sizes at which rates were tried
METHODS: dict[str, dict[str, object]] = {
  "vera": {"method": "vera", "vera.rank": 256},
  "lora 1": {"method": "lora", "lora.rank": 1},
  "lora 8": {"method": "lora", "lora.rank": 8},
  "lora_xs": {"method": "lora_xs", "lora_xs.rank": 25},
  "full": {"method": "full"},
}
# Of each method, at 64 and at 4,096 sentences.
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  "vera": ((0.009, 0.018, 0.036), (0.009, 0.018, 0.036)),
  "lora 1": ((0.0005, 0.001, 0.002, 0.004), (0.001, 0.002, 0.004)),
  "lora 8": ((0.0005, 0.001, 0.002, 0.004), (0.001, 0.002, 0.004, 0.008)),
  "lora_xs": (
    (0.0015, 0.003, 0.006, 0.012, 0.024),
    (0.0015, 0.003, 0.006, 0.012),
  ),
  "full": ((1.5e-5, 3e-5, 6e-5), (1.5e-5, 3e-5, 6e-5)),
}
LIMITS: dict[str, dict[str, object]] = {
  "rank": {"method": "vera", "vera.rank": 1024},
  "dvora": {"method": "dvora", "vera.rank": 256},
  **{
    f"pair {name}": {
      "method": "vera",
      "vera.rank": 256,
      "vera.init": "stored",
      "vera.pair": f"parts/pair_{name}",
    }
    for name in ("cola", "sst2")
  },
}
LIMIT_RATES = {
  "dvora": (0.009, 0.018, 0.036, 0.072),
  "pair cola": (0.009, 0.018, 0.036),
  "pair sst2": (0.0045, 0.009, 0.018, 0.036),
}
PAIR_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LONG_RATES = (5e-4, 1e-3, 2e-3)
OWN_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LONG = {  # as configs/minilm.py trains on CoLA
  "data.max_train_examples": 8551,
  "optim.batch_size": 32,
  "optim.epochs": 5,
  "eval_epochs": 1,
}
# What the rates' runs chose: at 64 and at 4,096 sentences.
BEST: dict[str, tuple[float, float]] = {
  "vera": (0.018, 0.018),
  "lora 1": (0.001, 0.002),
  "lora 8": (0.001, 0.004),
  "lora_xs": (0.012, 0.003),
  "full": (3e-5, 3e-5),
}
# That of r = 1,024 is VeRA's: by docs/rates.md it does not depend on the rank.
BEST_LIMIT = {
  "rank": 0.018,
  "dvora": 0.018,
  "pair cola": 0.018,
  "pair sst2": 0.009,
}
PAIR_RATE = 5e-4
RATE_SEED = (10,)
DRAWS = (1,)  # of A and B, beside 0, the study's


def get_config(part: str = "study") -> ConfigDict:
  parts = ("study", "rates", "pairs", "own_pairs", "limit_rates", "limits")
  common.pick(part, **{name: {} for name in parts})
  base = minilm.get_config("cola" if part == "pairs" else "sst2")
  base.optim.batch_size = BATCH
  base.eval_epochs = 1
  # each run has a rate of its own; its name depends on these as well
  base.vera.lr, base.lora.lr, base.lora_xs.lr = 1e-2, 1e-3, 1e-3
  base.full.lr, base.full.head_lr = 1e-5, base.head.head_lr
  if part == "study":
    runs = [
      {**METHODS[name], **of_size(size), "optim.adapter_lr": rates[size > 512]}
      for size in SIZES
      for name, rates in BEST.items()
    ]
    return sweep("Score against data, MiniLM", base, with_seeds(runs, FEWER))
  if part == "rates":
    runs = [
      {**METHODS[name], **of_size(size), "optim.adapter_lr": rate}
      for name, both in RATES.items()
      for size, rates in zip(CHECKED, both, strict=True)
      for rate in rates
    ]
    title = "Rates by size of the data, MiniLM"
    return sweep(title, base, with_seeds(runs, RATE_SEED))
  base.update_from_flattened_dict(of_size(SIZES[-1]))
  if part in ("pairs", "own_pairs"):
    base.tied_lora.rank = 256
    base.method = "tied_lora"
    on_cola = part == "pairs"
    rates = PAIR_RATES if on_cola else OWN_RATES
    runs = with_seeds([{"optim.adapter_lr": rate} for rate in rates], RATE_SEED)
    if on_cola:
      runs += with_seeds([{"optim.adapter_lr": PAIR_RATE}], FEWER)
      longer = [{**LONG, "optim.adapter_lr": rate} for rate in LONG_RATES]
      runs += with_seeds(longer, RATE_SEED)
    source = "CoLA" if on_cola else "SST-2's other sentences"
    return sweep(f"Pairs trained on {source}, MiniLM", base, runs)
  if part == "limit_rates":
    runs = [
      {**LIMITS[name], "optim.adapter_lr": rate}
      for name, rates in LIMIT_RATES.items()
      for rate in rates
    ]
    title = "Rates of what may limit VeRA, MiniLM"
    return sweep(title, base, with_seeds(runs, RATE_SEED))
  runs = [
    {**LIMITS[name], "optim.adapter_lr": rate}
    for name, rate in BEST_LIMIT.items()
  ] + [
    {
      **METHODS["vera"],
      "vera.projection_seed": draw,
      "optim.adapter_lr": BEST["vera"][1],
    }
    for draw in DRAWS
  ]
  return sweep("What limits VeRA, MiniLM", base, with_seeds(runs, FEWER))


def of_size(size: int) -> dict[str, int]:
  """So many sentences, for as many epochs as the steps take; scored once."""
  epochs = STEPS * BATCH // size
  return {
    "data.max_train_examples": size,
    "optim.epochs": epochs,
    "eval_epochs": epochs,
  }


def with_seeds(runs: Overrides, numbers: Iterable[int]) -> Overrides:
  """A seed draws the sentences, too, the same for every method."""
  both = [{"seed": seed, "data.subset_seed": seed} for seed in numbers]
  return cross(runs, both)
