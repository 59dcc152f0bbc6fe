"""Does the rule of docs/rates.md say the best rate? Twelve settings, and LoRA.

  python -m benchmarks.rate_rows GLUE CIFAR10 ROWS
  python -m experiments.sweep --config=configs/sweeps/rate_rule.py:minilm \\
    --workdir=DIR/minilm --config.base.data.source=ROWS/minilm
  python -m experiments.sweep --config=configs/sweeps/rate_rule.py:dinov2 \\
    --workdir=DIR/dinov2 --config.base.data.source=ROWS/cifar10
  python -m experiments.sweep --config=configs/sweeps/rate_rule.py:smollm2 \\
    --workdir=DIR/smollm2 --config.base.data.train=ROWS/smollm2/train.jsonl \\
    --config.base.data.dev=ROWS/smollm2/dev.jsonl
  python -m benchmarks.rate_rule DIR docs/figures

minilm: MiniLM, SST-2's sentences, batches of 8. dinov2: DINOv2 at 42 pixels,
CIFAR-10, batches of 8. smollm2: SmolLM2-135M learns to write short sentences of
SST-2's, in batches of 2.

Each setting has 300 steps, one pass over the rows, two seeds, and five rates a
factor of two apart around the one that the rule predicted. The predictions were
written here, and committed, before any of these runs.

PREDICTED has each setting of a network: method, rank, VeRA's d_init or LoRA's
alpha, layers (q and v, or all linear ones).
"""

from ml_collections import ConfigDict

from configs import common, instruct, language, text
from configs.e2e import SMOLLM2
from configs.images import cifar10
from configs.sweeps import Overrides, cross, product, seeds, sweep

LORA = "lora"
PREDICTED: dict[str, dict[tuple[str, int, float, str], float]] = {
  "minilm": {
    ("vera", 16, 0.1, "qv"): 0.0286,
    ("vera", 1024, 0.1, "qv"): 0.0286,
    ("vera", 256, 0.01, "qv"): 0.0294,
    ("vera", 256, 1.0, "qv"): 0.00863,
    ("vera", 64, 0.1, "all"): 0.0277,
    ("vera", 256, 1.0, "all"): 0.00814,
    (LORA, 64, 8.0, "qv"): 0.00274,
  },
  "dinov2": {
    ("vera", 1024, 0.1, "qv"): 0.0238,
    ("vera", 64, 0.01, "qv"): 0.0247,
    ("vera", 256, 0.1, "all"): 0.0230,
    (LORA, 8, 16.0, "all"): 0.000732,
  },
  "smollm2": {
    ("vera", 16, 1.0, "qv"): 0.00387,
    ("vera", 256, 0.1, "all"): 0.0161,
    ("vera", 64, 0.01, "all"): 0.0174,
    (LORA, 2, 8.0, "qv"): 0.00144,
  },
}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the prediction
RATE_SEEDS = (20, 21)
ENCODER = (
  *("query", "key", "value", "attention/output/dense"),
  *("intermediate/dense", r"layer(_\d+)?/output/dense"),
)
TARGETS = {
  ("minilm", "qv"): ("query", "value"),
  ("minilm", "all"): ENCODER,
  ("dinov2", "qv"): ("query", "value"),
  ("dinov2", "all"): (*ENCODER[:4], "fc1", "fc2"),
  ("smollm2", "qv"): language.TARGETS,
  ("smollm2", "all"): instruct.TARGETS,
}


def get_config(network: str = "minilm") -> ConfigDict:
  common.pick(network, **dict.fromkeys(PREDICTED, {}))
  if network == "minilm":
    base = text.get_config()
    base.select = "loss"
  elif network == "dinov2":
    base = cifar10.get_config()
    base.data.shots = None
    base.eval_epochs = 1
    base.data.image_size = 42  # nine patches
    base.optim.weight_decay = 0.0
  else:
    base = language.get_config()
    base.model.name = SMOLLM2
  base.optim.epochs = 1
  base.optim.batch_size = 2 if network == "smollm2" else 8
  # each run has a rate of its own; its name depends on these as well
  base.vera.lr = base.lora.lr = 1e-2
  runs: Overrides = []
  for (method, rank, size, layers), rate in PREDICTED[network].items():
    scale = "lora.alpha" if method == LORA else "vera.d_init"
    runs += product(
      {
        "method": (method,),
        f"{method}.rank": (rank,),
        scale: (size,),
        f"{method}.targets": (TARGETS[network, layers],),
        "optim.adapter_lr": [rate * factor for factor in FACTORS],
      }
    )
  title = f"A rule for the rate, {network}"
  config = sweep(title, base, cross(runs, seeds(RATE_SEEDS)))
  config.members = 10  # a setting's
  return config
