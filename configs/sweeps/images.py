"""Study of images: methods on few images per class, and how they fare on more.

  python -m experiments.sweep --config=configs/sweeps/images.py:rates ...
  python -m experiments.sweep --config=configs/sweeps/images.py --workdir=DIR
  python -m experiments.sweep --config=configs/sweeps/images.py:shots ...
  python -m experiments.sweep --config=configs/sweeps/images.py:shot_rates ...

CIFAR-10 on DINOv2 ViT-S/14 (configs/images/cifar10.py:dinov2), ten epochs, one
evaluation at the end; --config.base.data.source=FOLDER names local files.

rates: each method with rates a factor of two to four apart, as many as it takes
until the best one has worse ones on both sides, on two seeds that are none of
the studies', scored on fifty training images per class that are not trained on;
never on the test split. methods: ten images per class, five seeds, of images
and of training alike, scored on all 10,000 test images. shots: 1, 10 and 100
images per class, three seeds, 2,000 test images, the head alone, VeRA and LoRA.
RandLoRA's authors found VeRA strong on few images and behind on many (arXiv
2502.00987). For 100 images, with ten times the steps, the rates are those that
shot_rates finds as rates does, on one seed; for 1 and 10 those of rates.

cifar100_base, cifar100_large, food101_base and so on: the paper's Table 5, one
data set on ViT-B or ViT-L, the head alone, full, VeRA and LoRA by
configs/images/DATASET.py, three seeds of images and of training. Not run by us,
for want of the weights.

Ridge regression has no rates and no sweep: experiments.ridge, for each
--config.data.subset_seed.
"""

import importlib
from typing import Any

from ml_collections import ConfigDict

from configs import common, open_choices
from configs.images import cifar10
from configs.sweeps import FEWER, SEEDS, cross, product, sweep, zipped

RATES = {
  "head": ("optim.head_lr", (1e-3, 4e-3, 16e-3, 64e-3)),
  "bitfit": ("optim.adapter_lr", (1e-3, 4e-3, 16e-3)),
  "vera": ("optim.adapter_lr", (2e-2, 4e-2, 8e-2, 16e-2)),
  "lora": ("optim.adapter_lr", (2e-3, 4e-3, 8e-3, 16e-3)),
  "full": ("optim.adapter_lr", (1e-5, 2e-5, 4e-5)),
}
# For 100 images per class: those that were tried, and the best.
SHOT_RATES = {
  "head": ("optim.head_lr", (1e-3, 4e-3, 16e-3, 64e-3)),
  "vera": ("optim.adapter_lr", (1e-2, 2e-2, 4e-2)),
  "lora": ("optim.adapter_lr", (5e-4, 1e-3, 2e-3, 4e-3)),
}
SHOT_BEST = {"head": 16e-3, "vera": 2e-2, "lora": 1e-3}
OTHERS = (10, 11)  # seeds
PAPER = [
  f"{name}_{size}"
  for name in ("cifar100", "food101", "flowers102", "resisc45")
  for size in ("base", "large")
]
STUDIED = 2000  # test images


def get_config(part: str = "methods") -> ConfigDict:
  ours = ("methods", "shots", "rates", "shot_rates")
  common.pick(part, **dict.fromkeys((*ours, *PAPER), {}))
  if part in PAPER:
    name, _, size = part.partition("_")
    module = importlib.import_module(f"configs.images.{name}")
    methods = product({"method": ("head", "full", "vera", "lora")})
    title = f"Images (the paper's Table 5), {name}, ViT {size}"
    numbers = both_seeds(open_choices.REPEATS.value)
    return sweep(title, module.get_config(size), cross(methods, numbers))
  base = cifar10.get_config()
  base.eval_epochs = base.optim.epochs
  methods = product({"method": RATES})
  if part in ("rates", "shot_rates"):
    base.data.dev_shots = 50
    # each run has a rate of its own; its name depends on these as well
    base.vera.lr, base.lora.lr, base.full.lr = 4e-2, 4e-3, 4e-5
    tried: dict[str, Any] = RATES
    others: tuple[int, ...] = OTHERS
    if part == "shot_rates":
      base.data.shots, tried, others = 100, SHOT_RATES, OTHERS[:1]
    runs: list[dict[str, Any]] = []
    for method, (key, rates) in tried.items():
      runs += product({"method": (method,), key: rates})
    return sweep("Rates for images", base, cross(runs, both_seeds(others)))
  if part == "shots":
    base.data.max_eval_examples = STUDIED
    runs = product({"method": SHOT_BEST, "data.shots": (1, 10)})
    for method, best in SHOT_BEST.items():
      key, _ = SHOT_RATES[method]
      runs.append({"method": method, "data.shots": 100, key: best})
    runs = cross(runs, both_seeds(FEWER))
    return sweep("CIFAR-10, images per class", base, runs)
  return sweep(
    "CIFAR-10, ten images per class", base, cross(methods, both_seeds(SEEDS))
  )


def both_seeds(numbers: Any) -> list[dict[str, Any]]:
  """The same seed for the choice of images and for training."""
  return zipped({"seed": [*numbers], "data.subset_seed": [*numbers]})
