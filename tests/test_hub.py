"""Names and folders of models, with the hub out of reach."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.faults.downloads import NAME
from tests.faults.downloads import hub as broken_hub
from vera_jax import hub
from vera_jax.errors import UserError
from vera_jax.hub import call_error, downloading
from vera_jax.models.folder import resolve

ASK = """
import sys, time
from vera_jax.errors import UserError
from vera_jax.models.folder import resolve
started = time.monotonic()
try:
  answer = str(resolve(sys.argv[1]))
except UserError as error:
  answer = f"UserError: {error}"
print(time.monotonic() - started)
print(answer)
"""
ROOT = Path(__file__).resolve().parents[1]


def ask(name, cache, **settings):
  """resolve() in a fresh process, since the client reads settings on import.

  Answers with the folder or the error, after checking the seconds it took.
  """
  done = subprocess.run(
    [sys.executable, "-c", ASK, name],
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
      "HF_HOME": str(cache),
      "HF_HUB_OFFLINE": "0",
      "XLA_FLAGS": "",
      **settings,
    },
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  seconds, answer = done.stdout.split("\n", 1)
  assert float(seconds) < 20
  return answer


def cached(cache, name="some/model") -> Path:
  """A snapshot as the hub's client leaves it."""
  repo = cache / "hub" / f"models--{name.replace('/', '--')}"
  snapshot = repo / "snapshots" / ("0" * 40)
  snapshot.mkdir(parents=True)
  (snapshot / "config.json").write_text("{}")
  (snapshot / "model.safetensors").write_bytes(b"")
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text("0" * 40)
  return snapshot


def assert_refused(answer):
  assert answer.startswith("UserError"), answer
  assert "config.model.name" in answer and "config.data.source" in answer


def test_a_folder_is_itself(tmp_path):
  assert resolve(tmp_path) == tmp_path
  assert resolve(str(tmp_path)) == tmp_path


def test_a_missing_network_says_what_makes_it():
  with pytest.raises(UserError, match="`make images` and `make networks`"):
    resolve("./networks/none-of-that-name")


@pytest.mark.parametrize("name", ["/no/folder", "./folder", "a/b/c", "~/no-x"])
def test_a_path_is_never_asked_of_the_hub(name, monkeypatch):
  monkeypatch.setattr(hub, "snapshot", lambda *_, **__: pytest.fail("asked"))
  with pytest.raises(UserError, match=f"There is no folder {name}"):
    resolve(name)


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A package that marks its import, and its distribution's list of files."""
  site = tmp_path / "site"
  model = site / "some_package" / "model"
  model.mkdir(parents=True)
  (model / "config.json").write_text("{}")
  for place in (site / "some_package", tmp_path / "here" / "local_package"):
    place.mkdir(parents=True, exist_ok=True)
    code = f"open({str(tmp_path / 'imported')!r}, 'w')"
    (place / "__init__.py").write_text(code)
    (place / "sub.py").write_text("")
  about = site / "another_name-1.0.dist-info"
  about.mkdir()
  (about / "METADATA").write_text("Metadata-Version: 2.1\nName: another-name\n")
  files = ["some_package/__init__.py", "some_package/model/config.json"]
  (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))
  monkeypatch.syspath_prepend(str(site))
  monkeypatch.syspath_prepend(str(tmp_path / "here"))
  monkeypatch.chdir(tmp_path / "here")
  yield site
  assert not (tmp_path / "imported").exists()


def test_a_package_is_found_by_its_list_of_files(installed):
  found = resolve("package:some_package/model")
  assert found == installed / "some_package/model"
  assert resolve("package:some_package") == installed / "some_package"


@pytest.mark.parametrize(
  "name, words",
  [
    ("some_package.sub/model", "'some_package.sub' .* is not installed"),
    ("local_package.sub/model", "'local_package.sub' .* is not installed"),
    ("local_package", "'local_package' .* is not installed"),
    ("", "'' .* is not installed"),
    ("some_package/../../here", "has no folder"),
    ("some_package/model/config.json", "has no folder"),
  ],
)
def test_looking_for_a_package_imports_nothing(name, words, installed):
  with pytest.raises(UserError, match=words):
    resolve(f"package:{name}")


def test_a_name_longer_than_any_path_is_refused():
  with pytest.raises(UserError, match="config.model.name"):
    resolve("x" * 10_000)


def test_offline_mode_is_refused():
  with pytest.raises(
    UserError, match="(?s)config.model.name.*config.data.source"
  ):
    resolve("some/model-that-was-never-fetched")


@pytest.mark.parametrize(
  "endpoint",
  [
    "http://127.0.0.1:9",
    pytest.param("http://no-such-host.invalid", marks=pytest.mark.slow),
  ],
)
def test_a_closed_port_or_unknown_host(endpoint, tmp_path):
  assert_refused(ask("some/model", tmp_path, HF_ENDPOINT=endpoint))


def test_an_earlier_download_serves(tmp_path):
  snapshot = cached(tmp_path)
  answer = ask("some/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
  assert answer == f"{snapshot}\n"


@pytest.mark.slow
def test_a_hub_that_never_answers(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    assert_refused(ask("some/model", tmp_path, HF_ENDPOINT=url))


def test_a_silent_name_server_is_not_waited_for():
  stuck = threading.Event()
  started = time.monotonic()
  error = call_error(stuck.wait, seconds=0.1)
  stuck.set()
  assert isinstance(error, TimeoutError)
  assert time.monotonic() - started < 5


@pytest.mark.slow
def test_half_a_download_does_not_serve(tmp_path):
  snapshot = cached(tmp_path)
  (snapshot / "model.safetensors").unlink()
  assert_refused(ask("some/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))


def test_a_download_that_breaks_off_is_an_error():
  with (
    pytest.raises(UserError, match="broke off: peer closed.*goes on with it"),
    downloading("some/model"),
  ):
    raise ConnectionError("peer closed connection")
  with (
    pytest.raises(UserError, match="the disk is full"),
    downloading("some/model"),
  ):
    raise OSError(errno.ENOSPC, "No space left on device")
  with (
    pytest.raises(KeyError),
    downloading("some/model", broken=(ConnectionError,)),
  ):
    raise KeyError("x")


@pytest.mark.slow
def test_a_hub_that_breaks_off_in_the_middle_of_a_file(tiny_model, tmp_path):
  with broken_hub(tiny_model, breaks=2) as (address, asked):
    answer = ask(NAME, tmp_path, HF_ENDPOINT=address)
  weights = Path(answer.strip()) / "model.safetensors"
  assert weights.read_bytes() == (tiny_model / weights.name).read_bytes()
  assert asked.count(weights.name) == 3
