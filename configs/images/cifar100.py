"""CIFAR-100: 100 classes of small photographs, 100 test images of each.

  python -m experiments.images --config=configs/images/cifar100.py
  python -m experiments.images --config=configs/images/cifar100.py:large

The paper's accuracies (Table 5, in percent), not ours:
  ViT-B: VeRA 84.8, LoRA 85.9, head alone 77.7, full 86.5
  ViT-L: VeRA 87.5, LoRA 87.0, head alone 79.4, full 86.8
Not run by us, for want of the weights and the images.
"""

from ml_collections import ConfigDict

from configs.images import images


def get_config(size: str = "base") -> ConfigDict:
  return images(
    "uoft-cs/cifar100",
    size,
    base={
      "head": 0.004,
      "full": (4e-05, 0.004),
      "vera": (0.02, 0.004),
      "lora": (0.004, 0.004),
    },
    large={
      "head": 0.0004,
      "full": (4e-05, 0.004),
      "vera": (0.04, 0.002),
      "lora": (0.004, 0.004),
    },
  )
