"""Class folders, Parquet files and data sets give the same images."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest

from tests.pictures import COLOURS
from vera_jax.data.image_files import (
  draw_shots,
  image_files,
  open_dataset,
  open_folder,
)
from vera_jax.errors import UserError

CLASSES = tuple(COLOURS)


def contents(files, numbers=None):
  """What is read, as bytes."""
  numbers = np.arange(len(files)) if numbers is None else np.array(numbers)
  found = list(files.read(numbers))
  return [x if isinstance(x, bytes) else x.read() for x in found]


def as_dataset(tiny_images):
  """The same pictures as `datasets` keeps them, in columns."""
  made = {}
  for name, split in open_folder(tiny_images).splits.items():
    made[name] = datasets.Dataset.from_dict(
      {
        "img": [{"bytes": x, "path": None} for x in contents(split)],
        "fine_label": split.labels.tolist(),
        "coarse_label": [0] * len(split),
      },
      features=datasets.Features(
        {
          "img": datasets.Image(),
          "fine_label": datasets.ClassLabel(names=list(CLASSES)),
          "coarse_label": datasets.ClassLabel(names=["any"]),
        }
      ),
    )
  return datasets.DatasetDict(made)


def test_class_folders_with_and_without_splits(tiny_images, tmp_path):
  source = open_folder(tiny_images)
  assert source.classes == CLASSES and set(source.splits) == {"train", "test"}
  train = source.splits["train"]
  assert np.bincount(train.labels).tolist() == [8, 8, 8]
  assert contents(train, [9]) == [
    (tiny_images / "train/green/1.png").read_bytes()
  ]
  assert train.names[9].endswith("green/1.png")
  # a class may be called train: alone it is no split
  whole = tmp_path / "whole"
  shutil.copytree(tiny_images / "test", whole)
  (whole / "red").rename(whole / "train")
  (whole / "train/.hidden.png").write_bytes(b"")
  (whole / "train/notes.txt").write_text("no image")
  (whole / "train/more").mkdir()
  (whole / "train/0.png").rename(whole / "train/more/0.PNG")
  source = open_folder(whole)
  assert source.classes == ("blue", "green", "train")
  assert set(source.splits) == {"train"} and len(source.splits["train"]) == 12
  assert len(image_files(whole)) == 12


@pytest.mark.parametrize("where", ["parquet", "hub"])
def test_what_datasets_keeps_is_the_same(where, tiny_images, tmp_path):
  """In Parquet files over several row groups and files, and as a data set."""
  data = as_dataset(tiny_images)
  if where == "hub":
    source = open_dataset("owner/name", data)
  else:
    (tmp_path / "data").mkdir()
    for name, rows in data.items():
      for part in range(2):
        file = tmp_path / f"data/{name}-0000{part}-of-00002-ab12.parquet"
        rows.shard(2, part, contiguous=True).to_parquet(file, batch_size=5)
    source = open_folder(tmp_path)
  plain = open_folder(tiny_images)
  assert source.classes == plain.classes
  for name, split in plain.splits.items():
    found = source.splits[name]
    np.testing.assert_array_equal(found.labels, split.labels)
    assert contents(found) == contents(split)
    some = [1, 6, 7, len(split) - 1]
    assert contents(found, some) == contents(split, some)
  assert "row" in source.splits["train"].names[3]
  if where == "hub":
    with pytest.raises(UserError, match="not labelled by the 1 classes"):
      open_dataset("owner/name", wrong_labels(data), label="coarse_label")
    with pytest.raises(UserError, match="no split named train; it has test"):
      open_dataset("owner/name", {"test": data["test"]})
    with pytest.raises(UserError, match="one of labels are needed"):
      open_dataset("owner/name", data.remove_columns("fine_label"))


@pytest.mark.parametrize("where", ["parquet", "hub"])
def test_a_path_in_a_data_set_leads_nowhere_else(where, tmp_path, monkeypatch):
  """Its bytes are null, and the path was written by somebody else."""
  folder, private = tmp_path / "data", tmp_path / "private.png"
  folder.mkdir()
  (folder / "own.png").write_bytes(b"own")
  private.write_bytes(b"private")
  paths = ["/dev/zero", str(private), "own.png", str(folder / "own.png"), None]
  image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
  data = datasets.Dataset.from_dict(
    {
      "image": [{"bytes": None, "path": path} for path in paths],
      "label": [0] * len(paths),
    },
    features=datasets.Features(
      {"image": image, "label": datasets.ClassLabel(names=["any"])}
    ),
  )
  if where == "hub":
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    data = data.cast_column("image", datasets.Image(decode=False))
    source = open_dataset("owner/name", {"train": data})
  else:
    data.to_parquet(folder / "train.parquet")
    source = open_folder(folder)
  zero, elsewhere, *own, none = source.splits["train"].read(np.arange(5))
  assert [one.read() for one in own] == [b"own", b"own"] and none == b""
  for one in (zero, elsewhere):
    with pytest.raises(UserError, match="outside of .*data"):
      one.read()


def test_class_folders_that_lead_elsewhere(tiny_images, tmp_path):
  folder = tmp_path / "data"
  (folder / "cat").mkdir(parents=True)
  (folder / "dog").symlink_to(tiny_images / "test/red")
  (folder / "cat/0.png").symlink_to("/dev/zero")
  os.mkfifo(folder / "cat/1.png")
  (folder / "cat/2.png").symlink_to(tiny_images / "test/red/0.png")
  files = open_folder(folder).splits["train"]
  reasons = []
  for one in files.read(np.arange(4)):
    with pytest.raises(UserError) as error:
      one.read()
    reasons.append(str(error.value))
  assert "it is a pipe" in reasons.pop(1)
  assert all("outside of" in reason for reason in reasons)


def test_labels_that_are_no_ids(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
  info = json.dumps({"info": {"features": datasets.Features(kinds).to_dict()}})
  for labels, words in (([2**40], "not labelled by"), (["x"], "no class ids")):
    table = pa.table({"image": [{"bytes": b"x"}], "label": labels})
    table = table.replace_schema_metadata({"huggingface": info})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=words):
      open_folder(tmp_path)


def wrong_labels(data):
  rows = data["test"].remove_columns("coarse_label")
  rows = rows.add_column(
    "coarse_label", [-1] * len(rows), feature=datasets.ClassLabel(names=["any"])
  )
  return datasets.DatasetDict({"train": data["train"], "test": rows})


def test_what_is_no_data_set_of_images(tiny_images, tmp_path):
  with pytest.raises(UserError, match="holds no images"):
    open_folder(tmp_path)
  (tmp_path / "cat").mkdir()
  with pytest.raises(UserError, match="no images in its class folders"):
    open_folder(tmp_path)
  folder = tmp_path / "two"
  shutil.copytree(tiny_images, folder)
  shutil.move(folder / "test/red", folder / "test/rot")
  with pytest.raises(UserError, match="'rot', but no class of the training"):
    open_folder(folder)
  (tmp_path / "train.parquet").write_text(json.dumps({}))
  with pytest.raises(UserError, match="can't be read as Parquet"):
    open_folder(tmp_path)


def test_shots_are_of_each_class_and_never_scored():
  labels = np.repeat(np.arange(3, dtype=np.int32), (9, 7, 12))
  few, rest = draw_shots(labels, shots=2, dev_shots=None, seed=1)
  assert np.bincount(labels[few]).tolist() == [2, 2, 2]
  assert sorted([*few, *rest]) == list(range(28))
  more, dev = draw_shots(labels, shots=4, dev_shots=3, seed=1)
  assert set(few) < set(more) and not set(more) & set(dev)
  assert np.bincount(labels[dev]).tolist() == [3, 3, 3]
  other, _ = draw_shots(labels, shots=2, dev_shots=None, seed=2)
  assert set(other) != set(few)
  every, held = draw_shots(labels, shots=None, dev_shots=3, seed=1)
  assert len(every) == 28 - 9 and not set(every) & set(held)
  with pytest.raises(UserError, match="only 7 training images"):
    draw_shots(labels, shots=5, dev_shots=3, seed=0)


def test_metadata_of_columns_that_are_not_there(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  kinds = {"gone": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
  info = json.dumps({"info": {"features": datasets.Features(kinds).to_dict()}})
  table = pa.table({"image": [{"bytes": b"x"}], "label": [0]})
  table = table.replace_schema_metadata({"huggingface": info})
  parquet.write_table(table, tmp_path / "train.parquet")
  train = open_folder(tmp_path).splits["train"]
  assert list(train.read(np.array([0]))) == [b"x"]
