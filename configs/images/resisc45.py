"""RESISC45: 45 kinds of scenes from above, 700 images of each.

The data set has no test split: what is not trained on is scored, as in the
paper.

  python -m experiments.images --config=configs/images/resisc45.py
  python -m experiments.images --config=configs/images/resisc45.py:large

The paper's accuracies (Table 5, in percent), not ours:
  ViT-B: VeRA 77.0, LoRA 77.7, head alone 67.2, full 78.9
  ViT-L: VeRA 78.6, LoRA 78.3, head alone 67.8, full 79.0
Not run by us, for want of the weights and the images.
"""

from ml_collections import ConfigDict

from configs.images import images


def get_config(size: str = "base") -> ConfigDict:
  return images(
    "jonathan-roberts1/NWPU-RESISC45",
    size,
    base={
      "head": 0.04,
      "full": (8e-05, 0.004),
      "vera": (0.07, 0.005),
      "lora": (0.004, 0.004),
    },
    large={
      "head": 0.004,
      "full": (8e-05, 0.004),
      "vera": (0.07, 0.003),
      "lora": (0.004, 0.0004),
    },
  )
