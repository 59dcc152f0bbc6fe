"""Flowers102: 102 kinds of flowers, 6,149 test images.

  python -m experiments.images --config=configs/images/flowers102.py
  python -m experiments.images --config=configs/images/flowers102.py:large

The paper's accuracies (Table 5, in percent), not ours:
  ViT-B: VeRA 99.0, LoRA 98.8, head alone 98.4, full 98.9
  ViT-L: VeRA 99.2, LoRA 99.1, head alone 98.9, full 98.8
Not run by us, for want of the weights and the images.
"""

from ml_collections import ConfigDict

from configs.images import images


def get_config(size: str = "base") -> ConfigDict:
  return images(
    "dpdl-benchmark/oxford_flowers102",
    size,
    base={
      "head": 0.004,
      "full": (4e-05, 0.004),
      "vera": (0.04, 0.004),
      "lora": (0.004, 0.004),
    },
    large={
      "head": 0.004,
      "full": (4e-05, 0.008),
      "vera": (0.04, 0.002),
      "lora": (0.004, 0.004),
    },
  )
