"""What a run reports, and that a resumed one goes on where it stood."""

import json
import sys

import pytest

from vera_jax.errors import UserError
from vera_jax.progress import ProgressBar
from vera_jax.train.logging import MetricWriter


def steps(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def write(folder, numbers, **changes):
  with MetricWriter(folder, **{"config": {}, **changes}) as metrics:
    for step in numbers:
      metrics.write(step, {"loss": 1 / step})


def test_each_write_is_a_line_on_disk_at_once(tmp_path):
  with MetricWriter(tmp_path, config={}) as metrics:
    metrics.write(2, {"loss": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 2, "loss": 0.5}


def test_lines_beyond_the_save_are_written_anew(tmp_path):
  write(tmp_path, [1, 2, 3, 4])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "lo')  # cut off
  write(tmp_path, [3, 4, 5], step=2)
  assert steps(tmp_path) == [1, 2, 3, 4, 5]
  write(tmp_path, [1])  # nothing was saved
  assert steps(tmp_path) == [1]


def test_lines_that_are_damaged_are_kept_aside_and_named(tmp_path, caplog):
  """A run goes on without them; a blank or a cut-off line is nothing lost."""
  write(tmp_path, [1])
  damaged = [b'{"step": 2, "loss\xff": 1}', b'{"loss": 1.0}', b"[1]", b"x"]
  damaged += [b'{"step": "2"}', b"[" * 20_000]
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b"\n".join([*damaged, b"", b'{"step": 3, "loss": NaN}', b'{"s']))
  write(tmp_path, [4], step=3)
  assert steps(tmp_path) == [1, 3, 4]
  aside = tmp_path / "damaged" / "metrics.jsonl"
  assert aside.read_bytes().splitlines() == damaged
  *lines, last = caplog.messages
  reasons = ("2 can't be read: it is not UTF-8", "3 can't be read: it has no")
  for line, reason in zip(lines, reasons, strict=False):
    assert f"metrics.jsonl:{reason}" in line
  assert len(lines) == 6 and f"6 such lines were moved to {aside}" in last


def test_tensorboard_forgets_what_is_trained_again(tmp_path):
  from tensorboardX import proto

  config = {"optim": {"head_lr": 0.1}}
  write(tmp_path, [1, 2, 3], config=config)
  (first,) = (tmp_path / "tensorboard").iterdir()
  first.rename(first.with_suffix(".first"))  # names go by the second
  write(tmp_path, [3], step=2, config=config)
  starts = []
  for file in sorted((tmp_path / "tensorboard").iterdir()):
    data = file.read_bytes()
    assert b"train/loss" in data and b"optim.head_lr" in data
    while data:
      size = int.from_bytes(data[:8], "little")
      event = proto.event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField("session_log"):
        starts.append(event.step)
  assert sorted(starts) == [1, 3]  # what stood there and later is purged


def test_no_terminal_no_bar_but_lines(capsys):
  with ProgressBar(steps=10) as bar:
    bar.advance(1, loss=1.0)
    bar.log("epoch 1 of 3: accuracy 0.5000 [not markup]" + 99 * " long")
  shown = capsys.readouterr().err
  assert shown.splitlines() == [
    "epoch 1 of 3: accuracy 0.5000 [not markup]" + 99 * " long"
  ]


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # is not asked for
  write(tmp_path, [1], primary=False, wandb="project")
  with ProgressBar(steps=10, primary=False) as bar:
    bar.log("hello")
  assert capsys.readouterr().err == ""
  assert not list(tmp_path.iterdir())


def test_wandb_is_only_asked_for_where_it_is_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    MetricWriter(tmp_path, config={}, wandb="project")
  assert not list(tmp_path.iterdir())


def test_boards_have_names_in_groups_and_rates(tmp_path):
  written = []

  class Board:
    def write(self, step, values):
      written.append((step, values))

    def close(self):
      pass

  rates = {1: {"adapter_lr": 0.5}}
  with MetricWriter(tmp_path, config={}, rates=rates.__getitem__) as metrics:
    metrics._writers[1:] = [Board()]
    metrics.write(1, {"loss": 2.0, "speed/mfu": 0.1})
    metrics.write(1, {"epoch": 1, "accuracy": 0.75})
  assert written == [
    (1, {"train/loss": 2.0, "speed/mfu": 0.1, "train/adapter_lr": 0.5}),
    (1, {"eval/epoch": 1, "eval/accuracy": 0.75}),
  ]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0]) == {"step": 1, "loss": 2.0, "speed/mfu": 0.1}
  assert json.loads(lines[1]) == {"step": 1, "epoch": 1, "accuracy": 0.75}


def test_wandb_gets_the_same_metrics(tmp_path, monkeypatch):
  calls = []

  class Wandb:
    @staticmethod
    def init(**settings):
      calls.append((settings["project"], settings["id"]))
      return Wandb

    @staticmethod
    def log(values, *, step):
      calls.append((step, values))

    @staticmethod
    def finish():
      calls.append("finished")

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  write(tmp_path, [1], wandb="project")
  (project, name), *rest = calls
  assert project == "project"
  assert rest == [(1, {"train/loss": 1.0}), "finished"]
  write(tmp_path, [2], step=1, wandb="project")  # resumed: the same run
  write(tmp_path, [1], wandb="project")  # begun anew
  ids = [one[1] for one in calls if one[0] == "project"]
  assert ids[:2] == [name, name] and ids[2] != name
