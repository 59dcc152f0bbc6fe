"""What a run tells, and that a resumed one goes on where it stood."""

import json
import sys

import pytest

from vera_jax.errors import UserError
from vera_jax.train.logging import Reporter


def make(folder, **changes):
  settings = {"config": {}, "steps": 10, **changes}
  return Reporter(folder, **settings)


def steps(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def write(folder, numbers, **changes):
  with make(folder, **changes) as report:
    for step in numbers:
      report.advance(step, loss=1.0)
      report.write(step, {"loss": 1 / step})


def test_a_line_for_each_write(tmp_path):
  write(tmp_path, [1, 2])
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[1]) == {"step": 2, "loss": 0.5}


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
  with make(tmp_path) as report:
    report.write(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]


def test_lines_beyond_the_save_are_written_anew(tmp_path):
  write(tmp_path, [1, 2, 3, 4])
  write(tmp_path, [3, 4, 5], step=2)
  assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_run_that_saved_nothing_starts_over(tmp_path):
  write(tmp_path, [1, 2])
  write(tmp_path, [1])
  assert steps(tmp_path) == [1]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  write(tmp_path, [1, 2])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')
  write(tmp_path, [3], step=2)
  assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_forgets_what_is_trained_again(tmp_path):
  from tensorboardX import proto

  write(tmp_path, [1, 2, 3])
  (first,) = (tmp_path / "tensorboard").iterdir()
  first.rename(first.with_suffix(".first"))  # names go by the second
  write(tmp_path, [3], step=2)
  starts = []
  for file in sorted((tmp_path / "tensorboard").iterdir()):
    data = file.read_bytes()
    assert b"loss" in data
    while data:
      size = int.from_bytes(data[:8], "little")
      event = proto.event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField("session_log"):
        starts.append(event.step)
  assert sorted(starts) == [
    1,
    3,
  ]  # what stood at these steps and later is purged


def test_no_terminal_no_bar_but_lines(tmp_path, capsys):
  with make(tmp_path) as report:
    report.advance(1, loss=1.0)
    report.log("epoch 1 of 3: accuracy 0.5000 [not markup]" + 99 * " long")
  told = capsys.readouterr().err
  assert told.splitlines() == [
    "epoch 1 of 3: accuracy 0.5000 [not markup]" + 99 * " long"
  ]


def test_other_processes_are_silent(tmp_path, capsys):
  write(tmp_path, [1], primary=False)
  with make(tmp_path, primary=False) as report:
    report.log("hello")
  assert capsys.readouterr().err == ""
  assert not list(tmp_path.iterdir())


def test_wandb_is_only_asked_for_where_it_is_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    make(tmp_path, wandb="project")
  assert not list(tmp_path.iterdir())


def test_wandb_gets_the_same_figures(tmp_path, monkeypatch):
  told = []

  class Wandb:
    @staticmethod
    def init(**settings):
      told.append((settings["project"], settings["id"]))
      return Wandb

    @staticmethod
    def log(values, *, step):
      told.append((step, values))

    @staticmethod
    def finish():
      told.append("finished")

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  write(tmp_path, [1], wandb="project")
  (project, name), *rest = told
  assert project == "project"
  assert rest == [(1, {"loss": 1.0}), "finished"]
  write(tmp_path, [2], step=1, wandb="project")  # resumed: the same run
  write(tmp_path, [1], wandb="project")  # begun anew
  ids = [one[1] for one in told if one[0] == "project"]
  assert ids[:2] == [name, name] and ids[2] != name
