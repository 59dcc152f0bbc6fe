"""Places by name: what is a path, what is refused, and what a local run takes
along."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vera_jax import places
from vera_jax.errors import UserError
from vera_jax.files import (
  check_free,
  make_folder,
  read_bytes,
  read_json,
  write_file,
  write_json,
)
from vera_jax.places import (
  Mirror,
  is_remote,
  list_files,
  local_copy,
  local_place,
  move_folder,
  place,
  upload,
)
from vera_jax.places import (
  store as client,
)


def test_a_local_place_is_absolute_and_its_home_is_filled_in(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert place("runs/a") == tmp_path / "runs/a"
  assert place("~/runs") == tmp_path / "home/runs"
  assert place(Path("x")) == tmp_path / "x"
  assert local_copy("~/data") == tmp_path / "home/data"
  assert local_copy("data") == local_place("data", "--out") == Path("data")
  assert not is_remote(tmp_path) and not is_remote("owner/name")


@pytest.mark.parametrize(
  "name",
  (
    "s3://bucket/run",
    "http://host/run",
    "hdfs://host/run",
    "file:///tmp/run",
    "gs:/bucket/run",  # what pathlib has made of gs://
    "GS://bucket/run",
    "gs://",
  ),
)
@pytest.mark.parametrize("read", (place, local_copy))
def test_another_scheme_is_refused_with_what_works(name, read):
  with pytest.raises(UserError, match="What works: .* gs://BUCKET/NAME"):
    read(name)


@pytest.mark.parametrize("name", ("a*", "a/[b]", "a#1", "../a", "a/./b"))
def test_names_that_a_store_takes_for_patterns_are_refused(name):
  with pytest.raises(UserError, match="a name in a store has none of"):
    place(f"gs://bucket/{name}")


@pytest.mark.parametrize("name", ("gs://bucket/x", "s3://x/y"))
def test_what_must_be_local_refuses_a_store_by_the_flags_name(name):
  with pytest.raises(UserError, match="--out is a path of this machine"):
    local_place(name, "--out")


def test_local_places_import_no_client_of_a_store():
  names = ("gcsfs", "fsspec", "google.cloud", "aiohttp")  # jax has epath
  code = (
    "import sys; from vera_jax.places import *; place('x'); local_copy('x');"
    f" print([n for n in {names} if n in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty home folder, and so an empty cache."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path / "home"


def test_what_is_read_from_a_store_is_copied_once_for_each_state(
  bucket, home, tmp_path
):
  source, folder = tmp_path / "source", place(f"{bucket}/read/data")
  for name in ("a.tsv", "deep/b.bin", "empty"):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(name.encode() * (name != "empty"))
  upload(source, folder)
  copy = local_copy(str(folder))
  assert list_files(copy) == list_files(folder) == list_files(source)
  assert copy.parts[-2:] == ("read", "data")  # by which data are called
  assert all(
    (copy / x).read_bytes() == (source / x).read_bytes()
    for x in list_files(source)
  )
  first = (copy / "a.tsv").stat().st_mtime_ns
  assert local_copy(folder) == copy
  assert (copy / "a.tsv").stat().st_mtime_ns == first
  (folder / "a.tsv").write_text("a.tsv")  # the same size and bytes
  assert local_copy(folder) != copy
  file = local_copy(folder / "deep/b.bin")
  assert file.is_file() and file.parts[-2:] == ("deep", "b.bin")
  some = local_copy(folder, names=("b.bin",))
  assert list_files(some) == ["deep/b.bin"]
  with pytest.raises(UserError, match="There is no gs://.*/nothing, neither"):
    local_copy(f"{bucket}/nothing")
  with pytest.raises(UserError, match="gs://elsewhere can't be used.*no such"):
    place("gs://elsewhere/x")


def test_a_name_that_leads_out_of_its_folder_is_not_copied(
  bucket, home, monkeypatch
):
  evil = {"bucket/out/a/../../../evil": {"size": 1, "generation": "1"}}
  monkeypatch.setattr(client(), "find", lambda *_, **__: evil)
  with pytest.raises(UserError, match="leads out of its folder"):
    local_copy(f"{bucket}/out")
  assert not home.exists()


def test_files_and_folders_in_a_store_by_the_same_door(bucket):
  folder = place(f"{bucket}/door")
  with pytest.raises(UserError, match="There is no gs://bucket/door/x"):
    read_bytes(folder / "x", inside=folder, limit=9)
  write_json(folder / "x.json", {"a": 1})
  assert read_json(folder / "x.json") == {"a": 1}
  with pytest.raises(UserError, match="at most 3 are read"):
    read_bytes(folder / "x.json", inside=folder, limit=3)
  with pytest.raises(UserError, match="a folder"):
    read_bytes(folder, inside=None, limit=9)

  def fails(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError):
    write_file(folder / "half", fails)
  made = make_folder(folder / "new", lambda new: (new / "y").write_text("y"))
  assert made == 1 and list_files(folder) == ["new/y", "x.json"]
  with pytest.raises(UserError, match="is there already"):
    check_free(folder / "new")
  move_folder(folder / "new", folder / "moved/1")
  assert list_files(folder) == ["moved/1/y", "x.json"]


def test_a_file_that_grows_is_in_the_store_seconds_later(
  store, bucket, monkeypatch
):
  monkeypatch.setattr(places, "OFTEN", 0.1)
  target = place(f"{bucket}/mirror")

  def wait_for(text):
    end = time.monotonic() + 20
    while not (target / "a").exists() or (target / "a").read_text() != text:
      assert time.monotonic() < end
      time.sleep(0.05)

  mirror = Mirror(target)
  (mirror.local / "a").write_text("1")
  wait_for("1")
  with (mirror.local / "a").open("a") as file:
    file.write("2")
  mirror.copy()
  assert (target / "a").read_text() == "12"
  count = len(store.changes())
  time.sleep(0.5)
  assert len(store.changes()) == count  # what hasn't grown isn't written
  (mirror.local / "deep").mkdir()
  (mirror.local / "deep/b").write_text("b")
  (mirror.local / ".half.new").write_text("half")
  mirror.close()
  assert list_files(target) == ["a", "deep/b"]
  assert not mirror.local.exists()
