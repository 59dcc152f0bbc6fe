"""Images for `benchmarks.train`: DINOv2 learns to tell ten classes.

Both sides train on the same files: the chosen images, resized once, as PNG
files in class folders, and the network's weights in Hugging Face's layout with
a head beside them, drawn once, so that both start from it. VeRA has PEFT's own
matrices on both sides; LoRA's A is drawn by each side itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.train_e2e import batch_order
from configs.images import cifar10
from vera_jax.data.images import (
  CONFIG,
  Prepared,
  prepare_images,
  read_processor,
)
from vera_jax.files import read_json, write_json
from vera_jax.models.family import read_fields
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.tasks.images import select_images

TASK = "cifar10"
METHODS = ("vera", "lora", "head")
SCORED = 1000  # test images
PLACES = {"train": "train", "dev": "test"}  # folders, by our names of splits


def get_config() -> ConfigDict:
  config = cifar10.get_config()
  config.data.max_eval_examples = SCORED
  config.vera.init = "peft"
  for method in METHODS[:2]:  # the modules' names here, and transformers'
    config[method].targets = ("query|q_proj", "value|v_proj")
  return config


class Images:
  """A config's images and its network, as files in a folder.

  Makes the config name these files, whoever trains, and be scored once, at its
  end.
  """

  modules = {
    "vera_jax": "train_ours",
    "PEFT": "train_images_torch",
    "torch": "train_images_torch",
  }
  name, unit, score_name = TASK, "images", "accuracy"

  def __init__(self, config: ConfigDict, folder: Path) -> None:
    data = config.data
    self.title = config.model.name
    base = resolve(config.model.name)
    processor = read_processor(base, size=data.image_size)
    _, self.classes, chosen, _ = select_images(data)
    self.files: dict[str, list[tuple[str, int]]] = {}
    for name, (files, numbers) in chosen.items():
      images = prepare_images(files, numbers, processor, folder / "prepared")
      target = folder / "images" / PLACES[name]
      self.files[name] = write_images(images, self.classes, target)
    self.base = folder / "base"
    write_base(base, self.base, classes=self.classes, seed=config.seed)
    # as they are in the files
    fields = read_json(base / CONFIG) | {"do_center_crop": False}
    fields["size"] = {"height": processor.height, "width": processor.width}
    write_json(self.base / CONFIG, fields)
    self.colours = {
      "scale": processor.scale,
      "mean": processor.mean,
      "std": processor.std,
    }
    config.model.name = str(self.base)
    data.source = str(folder / "images")
    data.shots = data.max_train_examples = data.max_eval_examples = None
    config.eval_epochs = config.optim.epochs
    self.image_size = processor.height
    self.examples, self.dev_examples = map(len, self.files.values())
    self.count = self.examples  # per epoch

  def for_torch(self, config: ConfigDict) -> dict[str, Any]:
    """What our own run finds out by itself; the order of the images, too."""
    return {
      "base": str(self.base),
      "outputs": len(self.classes),
      "images": self.files,
      "order": batch_order(self.examples, config),
      **self.colours,
    }

  def scores(self, predictions: list[list[int]]) -> list[float]:
    """The share of right classes."""
    labels = np.array([label for _, label in self.files["dev"]])
    return [float(np.mean(np.array(some) == labels)) for some in predictions]


def write_images(
  images: Prepared, classes: tuple[str, ...], folder: Path
) -> list[tuple[str, int]]:
  """Class folders of PNG files; (file, class) in the order of their readers."""
  numbers = {name: i for i, name in enumerate(sorted(classes))}
  written = []
  for i, (pixels, label) in enumerate(
    zip(images.pixels, images.labels.tolist(), strict=True)
  ):
    name = classes[label]
    file = folder / name / f"{i:06}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    written.append((str(file), numbers[name]))
  return sorted(written, key=lambda one: (one[1], one[0]))


def write_base(
  base: Path, folder: Path, *, classes: tuple[str, ...], seed: int
) -> None:
  """The network with a new head, its weights in float32, which both read."""
  names = dict(enumerate(sorted(classes)))
  fields = dict(read_fields(base)) | {"id2label": names}
  fields["label2id"] = {name: i for i, name in names.items()}
  network = blueprint(fields, outputs=len(classes), scan=False)
  params = load_params(base, unflatten_dict(network.shapes)).params
  shape = network.shapes["classifier", "kernel"].shape
  rng = np.random.default_rng(seed)
  kernel = rng.normal(0, network.config.initializer_range, shape)
  params["classifier"] = {
    "kernel": kernel.astype(np.float32),
    "bias": np.zeros(shape[1], np.float32),
  }
  folder.mkdir(parents=True)
  write_json(folder / "config.json", fields)
  tensors = to_hf(params, network.config)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
