"""Names and folders of models, with the hub out of reach."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vera_jax.errors import UserError
from vera_jax.hub import resolve, trouble

ASK = """
import sys, time
from vera_jax.errors import UserError
from vera_jax.hub import resolve
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
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text("0" * 40)
  return snapshot


def refused(answer):
  assert answer.startswith("UserError"), answer
  assert "config.model.name" in answer and "config.data.source" in answer


def test_a_folder_is_itself(tmp_path):
  assert resolve(tmp_path) == tmp_path
  assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/folder", "./folder", "a/b/c", "~/no-x"])
def test_a_path_is_never_asked_of_the_hub(name):
  with pytest.raises(UserError, match="no folder"):
    resolve(name)


def test_a_bad_name_is_refused():
  with pytest.raises(UserError, match="config.model.name"):
    resolve("bad name")


def test_offline_mode_is_refused_at_once():
  with pytest.raises(
    UserError, match="(?s)config.model.name.*config.data.source"
  ):
    resolve("some/model-that-was-never-fetched")


@pytest.mark.parametrize(
  "endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"]
)
def test_a_closed_port_or_unknown_host(endpoint, tmp_path):
  refused(ask("some/model", tmp_path, HF_ENDPOINT=endpoint))


def test_an_earlier_download_serves(tmp_path):
  snapshot = cached(tmp_path)
  for settings in (
    {"HF_ENDPOINT": "http://127.0.0.1:9"},
    {"HF_HUB_OFFLINE": "1"},
  ):
    assert ask("some/model", tmp_path, **settings) == f"{snapshot}\n"


def test_a_hub_that_never_answers(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    refused(ask("some/model", tmp_path, HF_ENDPOINT=url))


def test_a_silent_name_server_is_not_waited_for():
  stuck = threading.Event()
  started = time.monotonic()
  error = trouble(stuck.wait, 0.1)
  stuck.set()
  assert isinstance(error, TimeoutError)
  assert time.monotonic() - started < 5
