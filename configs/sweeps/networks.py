"""Networks beyond Transformers: a convolutional one, and LSTMs.

  python -m experiments.sweep --config=configs/sweeps/networks.py:rates \\
    --workdir=DIR/rates --config.base.data.source=FOLDER_OF_CIFAR10
  python -m benchmarks.rates DIR/rates
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

rates, shot_rates, text_rates: each method's rate, for 10 images per class on
two seeds that no study has, for 100 and for texts on one. First four rates a
factor of four apart, then what `benchmarks.rates` asks for beyond their ends,
then, for 10 images per class, the best one's neighbours a factor of two away.
Scored on training examples that are kept from training: fifty other images of
each class; the first texts of 100 inputs of train.txt. Never on what the
studies score. Of images the head's rate was chosen first: it is the head's
beside the other methods.

By the sum of their runs' seconds, each run with one core beside other work,
they took in core-hours: images 0.5, rates 0.4, shot_rates 0.3, texts 0.6,
text_rates 1.2.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import common, e2e_texts
from configs.images import cifar10
from configs.sweeps import FEWER, Overrides, cross, seeds, sweep
from configs.sweeps.images import both_seeds

HEAD, OTHERS = "optim.head_lr", "optim.adapter_lr"
OTHER_SEEDS: tuple[int, ...] = (10, 11)


class Rates(NamedTuple):
  """Of one method.

  Attributes:
    key: the setting that is the method's rate.
    tried: all rates that were run.
    best: the rule's choice.
  """

  key: str
  tried: tuple[float, ...]
  best: float


def by_four(first: float) -> tuple[float, ...]:
  return tuple(first * 4**k for k in range(4))


IMAGES = {  # 10 per class
  "head": Rates(HEAD, (*by_four(1e-3), 2e-3, 8e-3), 4e-3),
  "norms": Rates(OTHERS, (*by_four(1e-3), 2e-3, 8e-3), 4e-3),
  "vera": Rates(OTHERS, (*by_four(1e-2), 5e-3, 2e-2), 1e-2),
  "lora": Rates(OTHERS, (*by_four(1e-3), 5e-4, 2e-3), 1e-3),
  "full": Rates(OTHERS, (*by_four(4e-5), 8e-5, 3.2e-4), 8e-5),
}
SHOTS = {  # 100 per class
  "head": Rates(HEAD, (*by_four(1e-3), 2e-3, 8e-3), 4e-3),
  "norms": Rates(OTHERS, by_four(1e-3), 4e-3),
  "vera": Rates(OTHERS, by_four(2.5e-3), 4e-2),
  "lora": Rates(OTHERS, by_four(2.5e-4), 4e-3),
  "full": Rates(OTHERS, by_four(1e-5), 1.6e-4),
}
TEXTS = {
  "head": Rates(HEAD, (*by_four(1e-3), 0.256), 6.4e-2),
  "bitfit": Rates(OTHERS, (*by_four(1e-3), 0.256, 1.024), 0.256),
  "vera": Rates(OTHERS, by_four(1e-2), 0.16),
  "lora": Rates(OTHERS, (*by_four(1e-3), 0.256), 6.4e-2),
  "full": Rates(OTHERS, (*by_four(1e-4), 2.56e-2, 0.1024), 2.56e-2),
}
IMAGE_PARTS = "images", "rates", "shot_rates"
TEXT_PARTS = "texts", "text_rates"
OF_IMAGES, OF_TEXTS = "CIFAR-10, EfficientNet-Lite0", "E2E's texts, LSTM"


def get_config(part: str = "images") -> ConfigDict:
  common.pick(part, **dict.fromkeys([*IMAGE_PARTS, *TEXT_PARTS], {}))
  make = images if part in IMAGE_PARTS else texts
  config = make(part)
  config.members = 1
  return config


def images(part: str) -> ConfigDict:
  base = cifar10.get_config("efficientnet_lite0")
  ten, hundred = (
    {
      "data.shots": shots,
      "optim.epochs": epochs,
      "eval_epochs": epochs,
      HEAD: methods["head"].best,
    }
    for shots, epochs, methods in ((10, 10, IMAGES), (100, 3, SHOTS))
  )
  if part == "images":
    base.data.max_eval_examples = 2000
    runs = at_best(IMAGES, ten) + at_best(SHOTS, hundred)
    return sweep(OF_IMAGES, base, cross(runs, both_seeds(FEWER)))
  methods, length, numbers = IMAGES, ten, OTHER_SEEDS
  if part == "shot_rates":
    methods, length, numbers = SHOTS, hundred, OTHER_SEEDS[:1]
  base.data.dev_shots = 50
  # each run has a rate of its own; its name depends on these as well
  base.vera.lr, base.lora.lr, base.full.lr = 4e-2, 4e-3, 4e-5
  base.norms.lr = 1e-3
  runs = cross(all_tried(methods, length), both_seeds(numbers))
  return sweep(f"Rates: {OF_IMAGES}", base, runs)


def texts(part: str) -> ConfigDict:
  base = e2e_texts.get_config()
  # each run has a rate of its own; its name depends on these as well
  base.full.lr = 2e-5
  if part == "texts":
    untuned = {"method": "vera", OTHERS: 0.0, "data.max_train_examples": 8}
    runs: Overrides = [untuned, *cross(at_best(TEXTS, {}), seeds(FEWER))]
    return sweep(OF_TEXTS, base, runs)
  base.data.held_out = 100
  base.vera.lr, base.lora.lr = 1e-2, 1e-3
  base.bitfit.lr = base.head.head_lr = 1e-3
  runs = cross(all_tried(TEXTS, {}), seeds(OTHER_SEEDS[:1]))
  return sweep(f"Rates: {OF_TEXTS}", base, runs)


def all_tried(
  methods: Mapping[str, Rates], settings: Mapping[str, float]
) -> Overrides:
  """Each method at each of its rates, with other settings."""
  return [
    {"method": method, **settings, rates.key: rate}
    for method, rates in methods.items()
    for rate in rates.tried
  ]


def at_best(
  methods: Mapping[str, Rates], settings: Mapping[str, float]
) -> Overrides:
  """Each method at its own rate, with other settings."""
  return [
    {"method": method, **settings, rates.key: rates.best}
    for method, rates in methods.items()
  ]
