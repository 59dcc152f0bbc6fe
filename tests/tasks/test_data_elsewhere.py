"""A file of a data set's folder that leads elsewhere is not read, by any task;
nor is one that becomes far more than it is."""

import gzip
import os

import pytest
from ml_collections import ConfigDict

from vera_jax.errors import UserError
from vera_jax.tasks import e2e_files, glue_data, superglue
from vera_jax.tasks.glue_facts import glue_task
from vera_jax.tasks.text_files import read_tables


def texts(folder):
  read_tables(ConfigDict({"source": str(folder), "train": None, "dev": None}))


READERS = {
  "train.tsv": lambda f: glue_data.load_split(glue_task("rte"), f, "train"),
  "val.jsonl": lambda f: glue_data.load_split(
    superglue.TASKS["superglue_cb"], f, "validation"
  ),
  "valid.txt": lambda f: e2e_files.read_split(f, "valid"),
  "valid.txt.gz": lambda f: e2e_files.read_split(f, "valid"),
  "train.csv": texts,
  "train.parquet": texts,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_leads_elsewhere(name, tmp_path):
  folder, private = tmp_path / "data", tmp_path / "private"
  folder.mkdir()
  private.write_text("secret\n")
  for place in (private, "/dev/zero"):
    (folder / name).symlink_to(place)
    with pytest.raises(UserError, match=f"leads to {place}, outside of"):
      READERS[name](folder)
    (folder / name).unlink()
  os.mkfifo(folder / name)
  with pytest.raises(UserError, match="it is a pipe"):
    READERS[name](folder)


def test_a_packed_file_has_a_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(e2e_files, "LARGEST", 1000)
  data = gzip.compress(b"a || b\n" * 1000)
  assert len(data) < 1000
  (tmp_path / "valid.txt.gz").write_bytes(data)
  with pytest.raises(UserError, match="unpacked it has more than 1,000 bytes"):
    e2e_files.read_split(tmp_path, "valid")
  (tmp_path / "valid.txt.gz").write_bytes(data[:20] + b"\xff" * 20)
  with pytest.raises(UserError, match="can't be unpacked"):
    e2e_files.read_split(tmp_path, "valid")
