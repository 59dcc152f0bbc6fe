"""A run whose folder is in a store: the same bytes as on disk, however it was
stopped, and nothing on this machine beside the caches."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_loop import flip_a_byte
from vera_jax import locks, places
from vera_jax.places import list_files, local_copy, place, store
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted
from vera_jax.train.run import Run
from vera_jax.train.workdir import LockLost

KILLED = """
import json, os, sys
from ml_collections import ConfigDict
from vera_jax.progress import ProgressBar
from vera_jax.train.loop import train_and_evaluate
config, folder, last = json.loads(sys.argv[1])
advance = ProgressBar.advance
def hooked(self, at, *, loss):
  advance(self, at, loss=loss)
  if at == last:
    os.kill(os.getpid(), 9)
ProgressBar.advance = hooked
train_and_evaluate(ConfigDict(config), folder)
"""


def test_stopped_and_resumed_in_a_store_is_as_on_disk(
  finished, bucket, stop_at, tmp_path, monkeypatch, assert_same_run
):
  monkeypatch.chdir(tmp_path)
  folder = f"{bucket}/runs/stopped"
  with monkeypatch.context():
    stop_at(14)
    with pytest.raises(Interrupted, match="SIGTERM, saved at step .* of 30"):
      train_and_evaluate(finished.config, folder)
  monkeypatch.undo()
  monkeypatch.chdir(tmp_path)
  (step,) = [x for x in place(folder).glob("checkpoints/1[1-9]")][-1:]
  lines = (place(folder) / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[-1])["step"] == int(step.name)
  train_and_evaluate(finished.config, folder)
  assert_same_run(local_copy(folder), finished.folder, 30)
  ours = [x for x in list_files(place(folder)) if "/" not in x]
  assert {"config.json", "metrics.jsonl", "result.json"} <= {*ours}
  assert "lock" not in ours
  assert not list(tmp_path.iterdir())
  train_and_evaluate(finished.config, folder)  # it is only reported


@pytest.mark.slow
@pytest.mark.parametrize("step", (4, 24))
def test_killed_and_resumed_in_a_store_is_as_on_disk(
  step, finished, bucket, assert_same_run
):
  folder = f"{bucket}/runs/killed{step}"
  task = json.dumps([finished.config.to_dict(), folder, step])
  done = subprocess.run(
    [sys.executable, "-c", KILLED, task], cwd=Path(__file__).parents[2]
  )
  assert done.returncode == -signal.SIGKILL
  train_and_evaluate(finished.config, folder)
  assert_same_run(local_copy(folder), finished.folder, 30)


@pytest.mark.slow
def test_a_damaged_save_in_a_store_is_set_aside(
  finished, stopped, bucket, tmp_path, caplog, assert_same_run
):
  folder = place(f"{bucket}/runs/damaged")
  places.upload(stopped, folder)
  newest = max(int(p.name) for p in (stopped / "checkpoints").iterdir())
  for save in (folder / "checkpoints").iterdir():  # as orbax marks them there
    (save / "commit_success.txt").write_text("")
  copy = tmp_path / "save"
  store().get(str(folder / f"checkpoints/{newest}"), str(copy), recursive=True)
  file = flip_a_byte(copy)
  places.upload(file, folder / f"checkpoints/{newest}" / file.relative_to(copy))
  cut_off = folder / "checkpoints/29"  # without orbax's mark: it is no save
  (cut_off / "state/x").write_text("half")
  train_and_evaluate(finished.config, folder)
  assert f"save of step {newest} is not used" in caplog.text
  assert list_files(folder / "damaged" / str(newest))
  assert not list_files(cut_off)
  assert_same_run(local_copy(folder), finished.folder, 30)


def test_who_lost_the_lock_writes_no_more(finished, bucket, monkeypatch):
  """As after a sleep in which another machine took the run over."""
  folder, evaluate = place(f"{bucket}/runs/lost"), Run.evaluate
  fields = {"host": "elsewhere", "pid": 1, "started": "", "id": "a"}
  theirs = json.dumps(fields)

  def lose(run, step, *args):
    evaluate(run, step, *args)
    if step == 20:
      lock = locks._lock(folder / "lock")
      lock.read()
      assert lock.write(theirs)
      (folder / "metrics.jsonl").write_text(theirs)

  monkeypatch.setattr(Run, "evaluate", lose)
  with pytest.raises(LockLost, match="by process 1 on elsewhere now"):
    train_and_evaluate(finished.config, folder)
  assert locks._lock(folder / "lock").read() == theirs
  assert (folder / "metrics.jsonl").read_text() == theirs
  assert not (folder / "checkpoints" / "20").exists()


@pytest.mark.slow
def test_a_run_on_disk_imports_no_client_of_a_store(finished, tmp_path):
  names = ("gcsfs", "google.cloud.storage", "boto3", "ray", "submitit")
  code = (
    "import json, sys; from ml_collections import ConfigDict;"
    " from vera_jax.train.loop import train_and_evaluate;"
    " config, folder = json.loads(sys.argv[1]);"
    " train_and_evaluate(ConfigDict(config), folder);"
    f" print([name for name in {names} if name in sys.modules])"
  )
  config = {**finished.config.to_dict(), "predict_test": True}
  task = json.dumps([config, str(tmp_path / "run")])
  done = subprocess.run(
    [sys.executable, "-c", code, task],
    cwd=Path(__file__).parents[2],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert done.stdout.splitlines()[-1:] == ["[]"]
