"""Networks beyond Transformers: a convolutional one, and LSTMs.

  python -m experiments.sweep --config=configs/sweeps/networks.py:rates \\
    --workdir=DIR/rates --config.base.data.source=FOLDER_OF_CIFAR10
  python -m experiments.sweep --config=configs/sweeps/networks.py ...
  python -m experiments.sweep --config=configs/sweeps/networks.py:text_rates \\
    --workdir=DIR/text_rates --config.base.data.source=FOLDER_OF_E2E
  python -m experiments.sweep --config=configs/sweeps/networks.py:texts ...

images: CIFAR-10 on EfficientNet-Lite0 at 96 pixels
(configs/images/cifar10.py:efficientnet_lite0), 10 images per class for ten
epochs and 100 for three, three seeds, of images and of training alike, scored
once on 2,000 test images. The head alone, BatchNorm's own scales and biases,
VeRA with r = 64 and LoRA with r = 4 on the pointwise convolutions, all weights.

texts: E2E's texts on textgenrnn's LSTMs (configs/e2e_texts.py), 400 texts for
two epochs, three seeds, in bits per character of 200 texts of valid.txt. The
output layer alone, biases, VeRA with r = 64 and LoRA with r = 2 on all gates,
all weights; and the network as it is: a rate of 0 trains nothing, and VeRA
starts as the identity, so eight texts are enough.

rates, text_rates: each method's rate, a factor of four apart, on one seed that
the studies have not; scored on training examples that are kept from training:
ten images per class beside the ten that are trained on; the first texts of 100
inputs of train.txt, 100 other texts being trained on. Never on what the studies
score. Where the best rate is at an end, there are to be more.

Runs train one by one. On two idle cores a step of 20 images took 0.1 s with
VeRA and 0.2 s with all weights, scoring 2,000 images 6.5 s and compiling 18 s;
a step of 8 texts 0.3 s, scoring 200 texts 4 s and compiling 6 to 8 s. By that
the 30 runs of images take 0.6 core-hours and their 20 of rates 0.3, the 16 of
texts 0.4 and their 20 of rates 0.2.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, e2e_texts
from configs.images import cifar10
from configs.sweeps import (
  FEWER,
  Overrides,
  cross,
  product,
  seeds,
  sweep,
  zipped,
)
from configs.sweeps.images import both_seeds

TITLES = {
  "images": "CIFAR-10, EfficientNet-Lite0",
  "rates": "Rates for EfficientNet-Lite0",
  "texts": "E2E's texts, character LSTM",
  "text_rates": "Rates for the character LSTM",
}
HEAD, OTHERS = "optim.head_lr", "optim.adapter_lr"
OTHER = 10  # a seed


def _by_four(first: float) -> tuple[float, ...]:
  return tuple(first * 4**k for k in range(4))


# By method: the setting that is its rate, and the rates.
IMAGES: dict[str, tuple[str, tuple[float, ...]]] = {
  "head": (HEAD, _by_four(1e-3)),
  "norms": (OTHERS, _by_four(1e-3)),
  "vera": (OTHERS, _by_four(1e-2)),
  "lora": (OTHERS, _by_four(1e-3)),
  "full": (OTHERS, _by_four(4e-5)),
}
TEXTS = {
  "head": (HEAD, _by_four(1e-3)),
  "bitfit": (OTHERS, _by_four(1e-3)),
  "vera": (OTHERS, _by_four(1e-2)),
  "lora": (OTHERS, _by_four(1e-3)),
  "full": (OTHERS, _by_four(1e-4)),
}


def get_config(part: str = "images") -> ConfigDict:
  common.pick(part, **dict.fromkeys(TITLES, {}))
  tuned = part in ("rates", "text_rates")
  if part in ("images", "rates"):
    methods, base = IMAGES, cifar10.get_config("efficientnet_lite0")
    base.eval_epochs = base.optim.epochs
    if tuned:
      base.data.dev_shots = 10
      base.data.subset_seed = OTHER
    else:
      base.data.max_eval_examples = 2000
  else:
    methods, base = TEXTS, e2e_texts.get_config()
    if tuned:
      base.data.held_out = base.data.max_train_examples = 100
      base.optim.epochs = base.eval_epochs = 1
  runs: Overrides
  if tuned:
    base.seed = OTHER
    runs = _rates(methods)
  elif part == "images":
    lengths = zipped(
      {
        "data.shots": (10, 100),
        "optim.epochs": (10, 3),
        "eval_epochs": (10, 3),
      }
    )
    runs = cross(product({"method": methods}), lengths, both_seeds(FEWER))
  else:
    untuned = {"method": "vera", OTHERS: 0.0, "data.max_train_examples": 8}
    runs = [untuned, *cross(product({"method": methods}), seeds(FEWER))]
  config = sweep(TITLES[part], base, runs)
  config.members = 1
  return config


def _rates(methods: dict[str, Any]) -> Overrides:
  return [
    {"method": method, key: rate}
    for method, (key, rates) in methods.items()
    for rate in rates
  ]
