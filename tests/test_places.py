"""Places by name: what is a path, what is refused, and what a local run takes
along."""

import subprocess
import sys
from pathlib import Path

import pytest

from vera_jax.errors import UserError
from vera_jax.places import is_remote, local_copy, local_place, place


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
