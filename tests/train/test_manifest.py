"""Whatever happens to a file of a save is noticed, and the file is named."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from vera_jax.errors import UserError
from vera_jax.train.checkpoint import Checkpoints
from vera_jax.train.manifest import (
  FILE,
  find_damage,
  read_manifest,
  write_manifest,
)


@pytest.fixture
def folder(tmp_path) -> Path:
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep/array").write_bytes(bytes(range(100)))
  (tmp_path / "progress.json").write_text("{}")
  write_manifest(tmp_path, {"step": 3, "config": {"targets": ("a", "b")}})
  return tmp_path


def flip(file: Path, place: int) -> None:
  data = bytearray(file.read_bytes())
  data[place] ^= 1
  file.write_bytes(data)


def test_an_untouched_folder_is_whole(folder):
  assert find_damage(folder) is None
  assert read_manifest(folder)["step"] == 3


def test_a_damaged_short_or_missing_file_is_named(folder):
  flip(folder / "deep/array", 50)
  assert f"{folder / 'deep/array'} is damaged" in find_damage(folder)
  (folder / "deep/array").write_bytes(bytes(range(50)))
  assert "deep/array is damaged" in find_damage(folder)
  (folder / "deep/array").unlink()
  assert "deep/array is missing" in find_damage(folder)


def test_a_file_elsewhere_is_not_read(folder, tmp_path_factory):
  outside = tmp_path_factory.mktemp("outside") / "array"
  (folder / "deep/array").rename(outside)
  (folder / "deep/array").symlink_to(outside)
  assert f"outside of {folder}" in find_damage(folder)


def test_what_the_manifest_does_not_name_is_no_link_either(folder):
  (folder / "_METADATA").symlink_to("/dev/zero")
  assert "_METADATA is not used: it leads to /dev/zero" in find_damage(folder)
  (folder / "_METADATA").unlink()
  os.mkfifo(folder / "deep/more")
  assert "it is a pipe" in find_damage(folder)


def test_every_byte_of_the_manifest_counts(folder):
  size = (folder / FILE).stat().st_size
  for place in range(0, size - 1):  # the last is a line break
    flip(folder / FILE, place)
    assert FILE in find_damage(folder), place
    flip(folder / FILE, place)


def test_without_a_manifest_the_save_was_cut_off(folder):
  (folder / FILE).unlink()
  assert "cut off" in find_damage(folder)
  with pytest.raises(UserError, match="cut off"):
    read_manifest(folder)


def test_each_file_of_a_real_save_is_in_the_manifest(tmp_path):
  with Checkpoints(tmp_path) as saves:
    saves.save(1, {"d": jnp.arange(8.0)}, {"a": 1})
  files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
  assert len(files) > 4
  for file in files:
    data = file.read_bytes()
    if file.name == FILE or not data:
      continue
    flip(file, len(data) // 2)
    assert str(file) in find_damage(tmp_path / "1")
    file.write_bytes(data)
  assert find_damage(tmp_path / "1") is None
