"""Classes of images: class folders, Parquet files, or a data set of the hub.

A few images per class may be trained on (`config.data.shots`), as the paper
does: ten. What is scored after each epoch is the test split, or images per
class of the training split that are not trained on, where rates are chosen.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.data import TaskData
from vera_jax.data.hub_data import download
from vera_jax.data.image_batches import ImageData
from vera_jax.data.image_files import (
  ImageFiles,
  ImageSet,
  draw_shots,
  open_dataset,
  open_folder,
)
from vera_jax.data.images import prepare_images, read_processor
from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.errors import UserError
from vera_jax.places import local_copy, local_place
from vera_jax.tasks.classification import classification
from vera_jax.tasks.own_rows import check_own_data
from vera_jax.tasks.task import Presentation, Size, Task

NAMES = ("images",)


class Selection(NamedTuple):
  """What a run has of a data set.

  Attributes:
    name, classes: the data set's name and the names of its classes.
    splits: "train" and "dev": the files, and the numbers of those that are
      used.
    where: what the scored images are, in words.
  """

  name: str
  classes: tuple[str, ...]
  splits: dict[str, tuple[ImageFiles, np.ndarray]]
  where: str


def task_for(config: ConfigDict) -> Task | None:
  """The task of a data set of images; None where config.task is another.

  Raises:
    UserError: the data can't be found, or have too few images per class.
  """
  if config.task not in NAMES:
    return None
  check_own_data(
    config,
    instead=". Answer image files by vera-jax predict"
    " --adapter=RUN/adapter --input=FOLDER",
  )
  name, classes, splits, where = select_images(config.data)
  chosen, scored = (numbers for _, numbers in splits.values())

  def load(
    config: ConfigDict,
    folder: Path,
    *,
    shards: int = 1,
    shard: ProcessShard = WHOLE,
  ) -> TaskData:
    """Decode, resize; choose how many images a batch has."""
    processor = read_processor(folder, size=config.data.image_size)
    cache = local_place(  # it is mapped into memory
      config.data.cache_dir or "~/.cache/vera_jax/images",
      "config.data.cache_dir, of images,",
    )
    prepared = {
      split: prepare_images(files, numbers, processor, cache)
      for split, (files, numbers) in splits.items()
    }
    optim, count = config.optim, len(prepared["dev"])
    batch_size = min(optim.batch_size, len(prepared["train"]))
    batches = max(1, round(count / config.eval_batch_size))
    return ImageData(
      splits=prepared,
      processor=processor,
      rows=_rows(min(batch_size, optim.microbatch_rows or batch_size), shards),
      eval_rows=_rows(-(-count // batches), shards),
      batch_size=batch_size,
      flip=config.data.flip,
      shift=config.data.shift,
      shard=shard,
    )

  side = config.data.image_size or 224
  task = classification(
    f"images:{name}",  # no name of a benchmark's task
    labels=classes,
    metrics=("accuracy",),
    load=load,
    dev_splits=("dev",),
    presentation=Presentation(
      size=Size(len(chosen), len(scored), (side // 16) ** 2 + 1),
      notes=(
        f"classes: {len(classes)}; images: {len(chosen)} for training,"
        f" {len(scored)} are scored, of {where}",
      ),
    ),
  )
  return task._replace(stored={"image_size": config.data.image_size})


def select_images(data: ConfigDict) -> Selection:
  """Which images of a data set a run trains on, and which it scores.

  Raises:
    UserError: the data can't be found, or have too few images per class.
  """
  name, images = open_source(data)
  train, test = images.splits["train"], images.splits.get("test")
  if data.dev_shots is None and test is None and data.shots is None:
    raise UserError(
      f"{data.source} has no test split: say how many images per class are"
      " trained on (config.data.shots=10), and all others are scored."
    )
  chosen = np.arange(len(train))
  scored = chosen
  if data.shots is not None or data.dev_shots is not None:
    chosen, scored = draw_shots(
      train.labels,
      shots=data.shots,
      dev_shots=data.dev_shots,
      seed=data.subset_seed,
    )
  chosen = _some(
    chosen, data.max_train_examples, "max_train_examples", data.subset_seed
  )
  dev, where = train, "training images that are not trained on"
  if data.dev_shots is None and test is not None:
    dev, scored, where = test, np.arange(len(test)), "the test split"
  if not len(scored):
    raise UserError(f"{data.source} has no image left to score.")
  # the same ones for every run
  scored = _some(scored, data.max_eval_examples, "max_eval_examples", 0)
  splits = {"train": (train, chosen), "dev": (dev, scored)}
  return Selection(name, images.classes, splits, where)


def _some(
  numbers: np.ndarray, most: int | None, setting: str, seed: int
) -> np.ndarray:
  """So many of the images, by seed; all of them for None."""
  if most is None:
    return numbers
  if most > len(numbers):
    raise UserError(
      f"config.data.{setting} is {most}, but there are {len(numbers)} images;"
      " leave it unset for all of them."
    )
  return np.sort(np.random.default_rng(seed).permutation(numbers)[:most])


def open_source(data: ConfigDict) -> tuple[str, ImageSet]:
  """The data set's name, and where its images lie.

  Raises:
    UserError: it can't be found or read.
  """
  if not data.source:
    raise UserError(
      "Name the images: config.data.source=FOLDER, with one folder per class"
      " or with .parquet files, or a hub id."
    )
  folder = local_copy(data.source)
  if folder.is_dir():
    return folder.absolute().name, open_folder(folder, label=data.label)
  hub_id, _, part = str(data.source).partition(":")
  splits = download(hub_id, part or None)
  return hub_id.rpartition("/")[2], open_dataset(
    hub_id, splits, label=data.label
  )


def _rows(count: int, shards: int) -> int:
  return -(-count // shards) * shards
