"""What the configs of images share: the paper's fourth experiment.

Ten training images per class, ten epochs, VeRA r = 256 and LoRA r = 8 on query
and value, AdamW with a linear schedule and weight decay 0.01 (Table 11). Batch
size, warm-up, LoRA's alpha and the rates of BitFit are ours; the paper doesn't
give them.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, open_choices

MODELS = {
  "base": "google/vit-base-patch16-224-in21k",
  "large": "google/vit-large-patch16-224-in21k",
}


def get_config() -> ConfigDict:
  """Everything but the data set and its rates."""
  config = common.get_config()
  config.task = "images"
  config.model.name = MODELS["base"]

  data = config.data
  data.source = placeholder(str)  # class folders, Parquet files, or a hub id
  data.max_length = placeholder(int)  # has no use here
  data.shots = 10  # training images per class, by subset_seed; unset: all
  # Images per class to score, of the training images beyond the shots; unset:
  # the test split is scored, or without one all other training images.
  data.dev_shots = placeholder(int)
  data.max_eval_examples = placeholder(int)  # scored ones; unset: all
  data.label = placeholder(str)  # a column of Parquet; unset: found by its name
  data.image_size = placeholder(int)  # of a side; unset: the checkpoint's
  data.flip = False  # mirror training images at random
  data.shift = 0  # move them at random by up to so many pixels

  config.eval_batch_size = 32
  config.eval_epochs = 1  # epochs from one evaluation to the next
  config.optim.epochs = 10
  config.optim.warmup_ratio = open_choices.IMAGE_WARMUP.value
  config.optim.batch_size = open_choices.IMAGE_BATCH.value
  config.optim.weight_decay = 0.01
  config.vera.rank = 256
  config.vera.d_init = open_choices.D_INIT.value
  inputs = r"layer(_\d+)?/output/dense|mlp/fc2"
  config.ia3.targets = ("key", "value", inputs)
  config.ia3.feedforward = (inputs,)
  config.bitfit.lr = config.bitfit.head_lr = 4e-3
  return config


def images(source: str, size: str, **columns: dict[str, Any]) -> ConfigDict:
  """A data set's config on ViT-B or ViT-L, by the paper's Table 11.

  Args:
    source: its hub id.
    size: base or large.
    columns: for each size the rates: `head`, and of each method (its own, the
      head's).
  """
  rates = common.pick(size, **columns)
  config = get_config()
  config.model.name = MODELS[size]
  config.data.source = source
  config.head.head_lr = rates["head"]
  for method in ("vera", "lora", "full"):
    config[method].lr, config[method].head_lr = rates[method]
  return config
