"""Food101: 101 dishes, 250 test images of each.

  python -m experiments.images --config=configs/images/food101.py
  python -m experiments.images --config=configs/images/food101.py:large

The paper's accuracies (Table 5, in percent), not ours:
  ViT-B: VeRA 89.0, LoRA 89.9, head alone 86.1, full 90.8
  ViT-L: VeRA 79.2, LoRA 79.5, head alone 76.5, full 78.7
Not run by us, for want of the weights and the images.
"""

from ml_collections import ConfigDict

from configs.images import images


def get_config(size: str = "base") -> ConfigDict:
  return images(
    "ethz/food101",
    size,
    base={
      "head": 0.004,
      "full": (4e-05, 0.04),
      "vera": (0.04, 0.04),
      "lora": (0.004, 0.004),
    },
    large={
      "head": 0.004,
      "full": (4e-05, 0.004),
      "vera": (0.04, 0.002),
      "lora": (0.004, 0.004),
    },
  )
