"""Where labelled images lie: class folders, Parquet files, a hub's data set.

Only names and labels are read at first; the files themselves when a run knows
which of them it uses.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from vera_jax.data.tables import (
  arrow,
  class_names,
  open_parquet,
  some,
  stored_features,
)
from vera_jax.errors import UserError
from vera_jax.files import IMAGE, read_bytes

SUFFIXES = (
  ".bmp",
  ".gif",
  ".jpeg",
  ".jpg",
  ".png",
  ".ppm",
  ".tif",
  ".tiff",
  ".webp",
)
# What splits are called: the first name that is there is taken.
SPLITS = {
  "train": ("train", "training"),
  "test": ("test", "testing", "validation", "valid", "val", "dev"),
}
UNPACKED = 2**28  # bytes that are taken from a Parquet file together
MOST = np.iinfo(np.int32).max  # of a class's id
LABELS = ("label", "labels", "fine_label", "class")


class ImageFile(NamedTuple):
  """An image's file, and the folder that it belongs to.

  `inside` is as for `files.open_file`: None where a person has named the file.
  """

  path: Path
  inside: Path | None

  def read(self) -> bytes:
    """Its bytes; raises a UserError where it can't be used."""
    return read_bytes(self.path, inside=self.inside, limit=IMAGE)


Encoded = bytes | ImageFile


@dataclass(frozen=True)
class ImageFiles:
  """The images of one split, not read yet.

  Attributes:
    labels: the class of each image.
    names: what messages call each image.
    read: (ascending numbers) -> what is to be decoded, in their order.
  """

  labels: Int32[np.ndarray, " images"]
  names: list[str]
  read: Callable[[np.ndarray], Iterator[Encoded]]

  def __len__(self) -> int:
    return len(self.labels)


class ImageSet(NamedTuple):
  """A data set: the names of its classes, by id, and its splits.

  `splits` has "train", and "test" where there is one.
  """

  classes: tuple[str, ...]
  splits: dict[str, ImageFiles]


def open_folder(folder: Path, *, label: str | None = None) -> ImageSet:
  """Class folders, or Parquet files as `datasets` writes them.

  Class folders hold the images of one class each. They may lie in a folder for
  each split (train/cat/1.jpg); without one, all images are for training.

  Args:
    folder: the folder of either.
    label: the label's column in Parquet files; None where its name says it.

  Raises:
    UserError: the folder holds neither.
  """
  tables = sorted(folder.rglob("*.parquet"))
  if tables:
    by_split: dict[str, list[Path]] = {}
    for table in tables:
      # train-00000-of-00002.parquet, or train/0000.parquet
      word = re.split(r"[-.]", table.name)[0]
      word = table.parent.name if word.isdigit() else word
      by_split.setdefault(word, []).append(table)
    return _image_set(
      str(folder),
      by_split,
      lambda files: _from_parquet(files, label, inside=folder),
    )
  folders = {path.name: path for path in folder.iterdir() if path.is_dir()}
  # a class may be called train: only the two together are splits
  if all(set(names) & set(folders) for names in SPLITS.values()):
    chosen = _splits(folders)
  else:
    chosen = {"train": folder}
  classes = tuple(
    sorted(
      path.name
      for path in chosen["train"].iterdir()
      if path.is_dir() and not path.name.startswith(".")
    )
  )
  if not classes:
    raise UserError(
      f"{folder} holds no images: config.data.source takes a folder with one"
      " folder per class, or with .parquet files, or a hub id."
    )
  splits = {
    name: _from_folders(of_split, classes, inside=folder)
    for name, of_split in chosen.items()
  }
  for name, split in splits.items():
    if not len(split):
      raise UserError(
        f"{chosen[name]} holds no images in its class folders: files that end"
        f" in {', '.join(SUFFIXES)} are."
      )
  return ImageSet(classes, splits)


def open_dataset(name: str, data: Any, *, label: str | None = None) -> ImageSet:
  """A data set as `datasets` gives it: by split, with rows and features."""
  from datasets import Image, config
  from huggingface_hub.constants import HF_HUB_CACHE

  # where the library keeps what it has downloaded
  caches = Path(config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)

  def split_of(rows: Any) -> tuple[ImageFiles, tuple[str, ...]]:
    features = rows.features.to_dict()
    image, target, classes = _columns(name, features, label)
    plain = rows.cast_column(image, Image(decode=False))

    def read(numbers: np.ndarray) -> Iterator[Encoded]:
      for number in numbers.tolist():
        yield _encoded(plain[number][image], caches)

    labels = np.array(rows[target], np.int32)
    numbered = [f"{name}, row {i}" for i in range(len(rows))]
    return ImageFiles(labels, numbered, read), classes

  return _image_set(name, data, split_of)


def _splits(by_word: Mapping[str, Any]) -> dict[str, Any]:
  """Those of the splits that are there, by our names of them."""
  return {
    split: by_word[word]
    for split, words in SPLITS.items()
    for word in [w for w in words if w in by_word][:1]
  }


def _image_set(
  name: str,
  by_word: Mapping[str, Any],
  split_of: Callable[[Any], tuple[ImageFiles, tuple[str, ...]]],
) -> ImageSet:
  """A data set whose splits name their classes themselves."""
  chosen = _splits(by_word)
  if "train" not in chosen:
    raise UserError(
      f"{name} has no split named train; it has {', '.join(by_word)}."
    )
  made = {split: split_of(value) for split, value in chosen.items()}
  classes = made["train"][1]
  for split, (files, named) in made.items():
    wrong = (files.labels < 0) | (files.labels >= len(classes))
    if named != classes or wrong.any() or not len(files):
      raise UserError(
        f"{name}: the images of {split} are not labelled by the"
        f" {len(classes)} classes of the training images, or there are none"
        " (-1 marks an image without a label)."
      )
  return ImageSet(classes, {split: files for split, (files, _) in made.items()})


def _from_folders(
  folder: Path, classes: tuple[str, ...], *, inside: Path
) -> ImageFiles:
  beyond = {
    path.name
    for path in folder.iterdir()
    if path.is_dir() and not path.name.startswith(".")
  } - set(classes)
  if beyond:
    raise UserError(
      f"{folder} has a folder {min(beyond)!r}, but no class of the training"
      " images is called so."
    )
  paths: list[Path] = []
  labels: list[int] = []
  for number, name in enumerate(classes):
    of_class = image_files(folder / name) if (folder / name).is_dir() else []
    paths += of_class
    labels += [number] * len(of_class)

  def read(numbers: np.ndarray) -> Iterator[Encoded]:
    return (ImageFile(paths[number], inside) for number in numbers.tolist())

  return ImageFiles(np.array(labels, np.int32), [*map(str, paths)], read)


def image_files(folder: Path) -> list[Path]:
  """The image files of a folder and of those in it, by their names' endings."""
  return sorted(
    path
    for path in folder.rglob("*")
    if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
  )


def _from_parquet(
  files: list[Path], label: str | None, *, inside: Path
) -> tuple[ImageFiles, tuple[str, ...]]:
  is_integer = arrow().types.is_integer
  labels: list[int] = []
  names: list[str] = []
  groups: list[tuple[Path, int, int]] = []  # file, row group, its rows
  classes: tuple[str, ...] = ()
  image = ""
  for path in files:
    with open_parquet(path, inside=inside) as file:
      about = stored_features(file, path)  # perhaps of other columns too
      features = {name: about.get(name, {}) for name in file.schema_arrow.names}
      image, target, named = _columns(str(path), features, label)
      if classes and named != classes:
        raise UserError(f"{path} has other classes than {files[0]}.")
      classes = named
      if not is_integer(file.schema_arrow.field(target).type):
        raise UserError(f"{path}: the column {target!r} has no class ids.")
      own_labels = file.read(columns=[target]).column(0).to_pylist()
      # an id of no class is found with those of the whole data set
      labels += [-1 if x is None else max(-1, min(x, MOST)) for x in own_labels]
      names += [f"{path}, row {i + 1}" for i in range(len(own_labels))]
      groups += [
        (path, i, file.metadata.row_group(i).num_rows)
        for i in range(file.num_row_groups)
      ]

  def read(numbers: np.ndarray) -> Iterator[Encoded]:
    first = 0
    for path, group, rows in groups:
      here = numbers[(numbers >= first) & (numbers < first + rows)] - first
      first += rows
      if not len(here):
        continue
      with open_parquet(path, inside=inside) as file:
        # few at a time: a file can name one large image many times
        about = file.metadata.row_group(group)
        at_once = max(1, min(8, UNPACKED // max(1, about.total_byte_size)))
        for batch in file.iter_batches(
          at_once, row_groups=[group], columns=[image]
        ):
          taken = here[(here >= 0) & (here < len(batch))]
          for value in batch.column(0).take(taken).to_pylist():
            yield _encoded(value, (inside,))
          here = here - len(batch)

  return ImageFiles(np.array(labels, np.int32), names, read), classes


def _encoded(value: Any, folders: Sequence[Path]) -> Encoded:
  """An image as `datasets` keeps it: its bytes, or the path of its file.

  The path is somebody else's, who may have written any: it counts where it
  leads into one of the data's own folders.
  """
  if not isinstance(value, Mapping):
    return value if isinstance(value, bytes) else b""
  if isinstance(value.get("bytes"), bytes) and value["bytes"]:
    return value["bytes"]
  if not isinstance(value.get("path"), str) or not value["path"]:
    return b""
  path = folders[0] / value["path"]
  inside = [f for f in folders if path.is_relative_to(f)]
  return ImageFile(path, (inside or folders)[0])


def _columns(
  name: str, features: Mapping[str, Any], label: str | None
) -> tuple[str, str, tuple[str, ...]]:
  """The columns of image and label, and the names of the classes.

  Raises:
    UserError: it isn't clear which columns these are, or classes have no names.
  """
  images = [
    column
    for column, feature in features.items()
    if isinstance(feature, Mapping) and feature.get("_type") == "Image"
  ]
  images = images or [x for x in ("image", "img") if x in features]
  labels = [label] if label else [x for x in LABELS if x in features]
  there = f"its columns are {some(features)}"
  if len(images) != 1 or len(labels) != 1 or labels[0] not in features:
    raise UserError(
      f"{name}: one column of images and one of labels are needed"
      f" (config.data.label names it); {there}."
    )
  classes = class_names(dict(features)).get(labels[0])
  if not classes:
    raise UserError(
      f"{name}: the column {labels[0]!r} has no names of classes, which"
      f" `datasets` keeps for a ClassLabel; {there}."
    )
  return images[0], labels[0], tuple(classes)


def draw_shots(
  labels: Int32[np.ndarray, " images"],
  *,
  shots: int | None,
  dev_shots: int | None,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Ascending numbers of the images to train on, and of those to score.

  For each class its images are shuffled by the seed, the same way whatever the
  numbers: the first ones are trained on and the next ones are scored, so that
  no image is both, and more shots keep the fewer ones.

  Args:
    labels: the class of each training image.
    shots: how many images per class are trained on; None for all that are not
      scored.
    dev_shots: how many images per class are scored; None for all that are not
      trained on.
    seed: what the shuffle is drawn from.

  Raises:
    UserError: a class has too few images.
  """
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  chosen: list[np.ndarray] = []
  scored: list[np.ndarray] = []
  for number in np.unique(labels):
    members = order[labels[order] == number]
    first = shots if shots is not None else len(members) - (dev_shots or 0)
    last = first + dev_shots if dev_shots is not None else len(members)
    if not 0 < first or last > len(members):
      raise UserError(
        f"A class has only {len(members)} training images, but"
        f" config.data.shots={shots} and config.data.dev_shots={dev_shots}."
      )
    chosen.append(members[:first])
    scored.append(members[first:last])
  return np.sort(np.concatenate(chosen)), np.sort(np.concatenate(scored))
