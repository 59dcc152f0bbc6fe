"""One folder, one config."""

import errno
import json
import os

import pytest

from vera_jax.errors import UserError
from vera_jax.train.workdir import (
  check,
  claim,
  full_disk_told,
  hold,
  write_json,
)

CONFIG = {
  "seed": 0,
  "vera": {"rank": 4, "targets": ("query", "value")},
  "log": {"every": 10},
  "predict_test": False,
}


def test_a_new_folder_is_made_and_claimed_again(tmp_path):
  folder = tmp_path / "runs" / "one"
  check(folder, CONFIG)
  assert not folder.exists()  # looking makes nothing
  claim(folder, CONFIG)
  claim(folder, CONFIG)
  written = json.loads((folder / "config.json").read_text())
  assert written["vera"]["targets"] == ["query", "value"]
  assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_another_config_is_refused_by_name(tmp_path):
  claim(tmp_path, CONFIG)
  other = {**CONFIG, "seed": 1, "vera": {**CONFIG["vera"], "rank": 8}, "new": 2}
  with pytest.raises(UserError) as caught:
    claim(tmp_path, other)
  told = str(caught.value)
  assert "seed: 0 there, 1 now" in told
  assert "vera.rank: 4 there, 8 now" in told
  assert "new: 'unset' there, 2 now" in told
  assert "targets" not in told and "--workdir" in told


def test_what_changes_no_result_may_differ(tmp_path):
  claim(tmp_path, CONFIG)
  changed = {**CONFIG, "log": {"every": 1}, "predict_test": True}
  claim(tmp_path, changed)
  assert json.loads((tmp_path / "config.json").read_text())["predict_test"]


@pytest.mark.parametrize("text", ["", '{"seed": ', "[1]", "\udcff"])
def test_a_broken_config_is_a_clear_error(text, tmp_path):
  data = text.encode("utf-8", "surrogateescape")
  (tmp_path / "config.json").write_bytes(data)
  with pytest.raises(UserError, match="config.json can't be read"):
    check(tmp_path, CONFIG)


def test_a_file_in_the_folders_place(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="run can't be used"):
    claim(tmp_path / "run", CONFIG)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "x.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no config.json"):
    claim(tmp_path, CONFIG)


def test_a_held_folder_is_refused_by_the_holders_name(tmp_path):
  folder = tmp_path / "runs" / "one"
  with hold(folder):
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
      with hold(folder):
        pass
  with hold(folder):  # free again, though the file is still there
    assert (folder / "lock").read_text().count("process") == 1


def test_a_folder_that_cannot_be_held(tmp_path):
  (tmp_path / "run").write_text("")
  with (
    pytest.raises(UserError, match="run can't be used"),
    hold(tmp_path / "run"),
  ):
    pass


def test_a_full_disk_is_told_wherever_it_is_met(tmp_path):
  with pytest.raises(UserError, match=f"disk of {tmp_path} is full"):
    with full_disk_told(tmp_path):
      try:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
      except OSError as error:
        raise RuntimeError("a layer above") from error
  for other in (OSError(errno.EACCES, "denied"), ValueError("x")):
    with pytest.raises(type(other)), full_disk_told(tmp_path):
      raise other
