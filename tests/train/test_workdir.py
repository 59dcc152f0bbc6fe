"""One folder, one config."""

import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from etils import epath

from configs import quickstart
from vera_jax.errors import UserError
from vera_jax.places import list_files, place
from vera_jax.train import loop
from vera_jax.train.run import Run
from vera_jax.train.workdir import (
  BEGAN,
  StoreLost,
  check_workdir,
  explain_full_disk,
  first_start,
  identity_code,
  lock_workdir,
  write_config,
)

CONFIG = {
  "method": "vera",
  "seed": 0,
  "vera": {"rank": 4, "targets": ("query", "value")},
  "log": {"every": 10},
  "predict_test": False,
}


def test_a_new_folder_is_made_and_found_again(tmp_path):
  folder = tmp_path / "runs" / "one"
  check_workdir(folder, CONFIG)
  assert not folder.exists()  # looking makes nothing
  write_config(folder, CONFIG)
  write_config(folder, CONFIG)
  written = json.loads((folder / "config.json").read_text())
  assert written["vera"]["targets"] == ["query", "value"]
  assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_another_config_is_refused_by_name(tmp_path):
  write_config(tmp_path, CONFIG)
  other = {**CONFIG, "seed": 1, "vera": {**CONFIG["vera"], "rank": 8}, "new": 2}
  with pytest.raises(UserError) as caught:
    write_config(tmp_path, other)
  message = str(caught.value)
  assert "seed: 0 there, 1 now" in message
  assert "vera.rank: 4 there, 8 now" in message
  assert "new: 'unset' there, 2 now" in message
  assert "targets" not in message and "--workdir" in message


def test_what_changes_no_result_may_differ(tmp_path):
  write_config(tmp_path, CONFIG)
  changed = {**CONFIG, "log": {"every": 1}, "predict_test": True}
  write_config(tmp_path, changed)
  assert json.loads((tmp_path / "config.json").read_text())["predict_test"]


def test_settings_of_other_methods_are_no_difference(tmp_path):
  """A run's identity holds what it uses; a chain uses those of its links."""
  write_config(tmp_path, CONFIG)
  others = {**CONFIG, "unilora": {"lr": 0.1}, "lora": {"rank": 64}}
  check_workdir(tmp_path, others)
  assert identity_code(others) == identity_code(CONFIG)
  assert identity_code({**others, "method": "vera+lora"}) != identity_code(
    {**CONFIG, "method": "vera+lora"}
  )
  more = {**CONFIG, "vera": {**CONFIG["vera"], "conv": "taps"}}
  assert identity_code(more) != identity_code(CONFIG)
  with pytest.raises(UserError, match="vera.conv: 'unset' there, 'taps' now"):
    check_workdir(tmp_path, more)


@pytest.mark.parametrize("targets", [[{}], 3, None, [["query"]]])
def test_odd_targets_are_another_config(targets, tmp_path):
  write_config(tmp_path, {**CONFIG, "vera": {"targets": targets}})
  with pytest.raises(UserError, match="vera.targets: "):
    check_workdir(tmp_path, CONFIG)


def test_what_is_left_open_is_no_difference(tmp_path):
  """A folder says stacked or looped; "auto" takes either, the other not."""
  auto, stacked, looped = (
    {**CONFIG, "model": {"name": "small", "scan": scan}}
    for scan in ("auto", True, False)
  )
  write_config(tmp_path, looped)
  assert check_workdir(tmp_path, auto)["model"]["scan"] is False
  check_workdir(tmp_path, looped)
  with pytest.raises(UserError, match="model.scan: False there, True now"):
    check_workdir(tmp_path, stacked)


@pytest.mark.parametrize("text", ["", '{"seed": ', "[1]", "\udcff"])
def test_a_broken_config_is_a_clear_error(text, tmp_path):
  data = text.encode("utf-8", "surrogateescape")
  (tmp_path / "config.json").write_bytes(data)
  with pytest.raises(UserError, match="config.json can't be read"):
    check_workdir(tmp_path, CONFIG)


def test_a_file_in_the_folders_place(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="run can't be used"):
    write_config(tmp_path / "run", CONFIG)
  with pytest.raises(UserError, match="run can't be used"):
    with lock_workdir(tmp_path / "run"):
      pass


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no config.json"):
    write_config(tmp_path, CONFIG)


def test_a_locked_folder_is_refused_by_the_owners_name(tmp_path):
  folder = tmp_path / "runs" / "one"
  with lock_workdir(folder):
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
      with lock_workdir(folder):
        pass
  with lock_workdir(folder):  # free again
    pass
  assert not (folder / "lock").exists()


def test_a_full_disk_is_explained_wherever_it_is_met(tmp_path):
  with pytest.raises(UserError, match=f"disk of {tmp_path} is full"):
    with explain_full_disk(tmp_path):
      try:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
      except OSError as error:
        raise RuntimeError("a layer above") from error
  for other in (OSError(errno.EACCES, "denied"), ValueError("x")):
    with pytest.raises(type(other)), explain_full_disk(tmp_path):
      raise other


def test_other_processes_hear_of_a_full_disk_what_it_means(
  tmp_path, monkeypatch
):
  heard = []

  @contextmanager
  def errors_in(*folders):
    try:
      yield
    except Exception as error:
      heard.append(str(error))
      raise

  def build(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(loop, "errors_in", errors_in)
  monkeypatch.setattr(loop, "build_setup", build)
  run = Run(quickstart.get_config(), tmp_path)
  with pytest.raises(UserError, match=f"disk of {tmp_path} is full"):
    loop.carry_out([run], lambda setup: ())
  assert f"disk of {tmp_path} is full" in heard[0]


def test_a_store_that_does_not_answer_is_named_with_what_to_do():
  errors = pytest.importorskip("gcsfs.retry")
  folder = epath.Path("gs://bucket/run")
  with pytest.raises(StoreLost, match="503.*the same command goes on"):
    with explain_full_disk(folder):
      try:
        raise errors.HttpError({"code": 503, "message": "Unavailable"})
      except errors.HttpError as error:
        raise RuntimeError("the save failed") from error
  with pytest.raises(ZeroDivisionError), explain_full_disk(folder):
    raise ZeroDivisionError


TWO = """
import sys
from vera_jax.errors import UserError
from vera_jax.places import list_files, place
from vera_jax.places import place
from vera_jax.train import distributed, workdir
address, number, folder = sys.argv[1:]
workdir.SHOWS = 1.0
distributed.initialize(address, 2, int(number))
folder = place(folder)
distributed.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
try:
  workdir.check_shared(folder)
except UserError as error:
  sys.exit(str(error))
"""


def of_two(*folders):
  """What two processes say of their folders."""
  with socket.create_server(("localhost", 0)) as server:
    address = "localhost:{1}".format(*server.getsockname())
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, address, str(number), str(folder)],
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "XLA_FLAGS": ""},
    )
    for number, folder in enumerate(folders)
  ]
  return [(p.communicate(timeout=300)[1], p.returncode) for p in processes]


@pytest.mark.slow
def test_a_folder_that_not_all_hosts_share_is_refused_by_all(tmp_path, bucket):
  one, other = tmp_path / "one", tmp_path / "other"
  for said, code in of_two(one, other):
    assert code == 1
    assert "is not one folder for all processes: what process 0 on" in said
    assert f"not seen by process 1 on {socket.gethostname()[:64]}." in said
  for said, code in [*of_two(one, one), *of_two(*[f"{bucket}/shared"] * 2)]:
    assert code == 0, said
  assert not list(one.iterdir()) and not list_files(place(f"{bucket}/shared"))


def test_when_a_run_began_is_kept_but_not_in_a_folder(tmp_path):
  assert first_start(tmp_path, 5.5) == first_start(tmp_path, 9) == 5.5
  (tmp_path / BEGAN).write_text("yesterday")
  assert first_start(tmp_path, 9) == 9
  (tmp_path / BEGAN).unlink()
  (tmp_path / BEGAN).mkdir()
  with pytest.raises(UserError, match="Remove it"):
    first_start(tmp_path, 9)
