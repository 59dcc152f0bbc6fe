"""Workers are started and waited for, and how they end is understood."""

import json
import os
import signal
import sys
import threading

import pytest

from configs.sweeps import product, seeds
from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.locks import locked
from vera_jax.sweep import worker
from vera_jax.sweep.launchers import local, process
from vera_jax.sweep.launchers.local import Local
from vera_jax.sweep.plan import make_units
from vera_jax.sweep.runner import run_units
from vera_jax.train.config import check_settings
from vera_jax.train.ensemble import group_key
from vera_jax.train.preemption import Interrupted
from vera_jax.train.workdir import DiskFull


def pretend(monkeypatch, code):
  """Workers run this instead; `unit` is what they are given."""
  start = "import json, os, sys; unit = json.loads(sys.stdin.readline())\n"
  monkeypatch.setattr(process, "WORKER", [sys.executable, "-c", start + code])
  monkeypatch.setattr(process, "POLL", 0.05)


FINISH = """
for run in unit["runs"]:
  os.makedirs(run["folder"], exist_ok=True)
  open(run["folder"] + "/result.json", "a").write("{}")
"""


def test_every_run_is_trained_once(tiny_sweep, monkeypatch, tmp_path):
  pretend(monkeypatch, FINISH)
  plan = tiny_sweep()
  parts = make_units(plan.runs, most=8)
  run_units(parts, Local(), logs=tmp_path / "logs")
  run_units(parts, Local(), logs=tmp_path / "logs", retry_failed=True)
  assert {run.state for run in plan.runs} == {"done"}
  for run in plan.runs:  # a second time would have appended
    assert (run.folder / results.FILE).read_text() == "{}"


def test_a_killed_worker_fails_and_is_retried_on_demand(
  tiny_sweep, monkeypatch, tmp_path
):
  plan = tiny_sweep()
  parts = make_units(plan.runs, most=8)
  pretend(
    monkeypatch,
    "if unit['runs'][0]['config']['method'] == 'lora':\n"
    "  print('last words', flush=True); os.kill(os.getpid(), 9)\n" + FINISH,
  )
  run_units(parts, Local(), logs=tmp_path / "logs")
  states = [run.state for run in plan.runs]
  assert states == ["done"] * 4 + ["failed"] * 2
  for words in ("SIGKILL", "--members=1", "last words"):
    assert words in plan.runs[-1].failure()
  pretend(monkeypatch, FINISH)
  run_units(parts, Local(), logs=tmp_path / "logs")
  assert plan.runs[-1].state == "failed"
  run_units(parts, Local(), logs=tmp_path / "logs", retry_failed=True)
  assert plan.runs[-1].state == "done"


def test_what_fails_at_once_everywhere_ends_the_sweep(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(
    monkeypatch,
    """
for run in unit["runs"]:
  os.makedirs(run["folder"])
  reason = {"failed": "no such folder: glue"}
  open(run["folder"] + "/failed.json", "w").write(json.dumps(reason))
sys.exit(1)
""",
  )
  plan = tiny_sweep(product({"vera.rank": (1, 2, 3, 4, 5)}))
  with pytest.raises(UserError, match="no such folder: glue") as caught:
    run_units(make_units(plan.runs, most=8), Local(), logs=tmp_path / "logs")
  assert "--retry_failed" in str(caught.value)
  assert [run.state for run in plan.runs] == ["failed"] * 3 + ["new"] * 2


@pytest.fixture
def ctrl_c():
  """SIGINT does what it does in a terminal: scripts start tests without it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_is_passed_on_and_waited_for(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(
    monkeypatch,
    f"""
os.kill(os.getppid(), {int(signal.SIGINT)})
sys.stdin.read()
open({str(tmp_path / "saved")!r}, "w").write("saved")
sys.exit(75)
""",
  )
  plan = tiny_sweep()
  with pytest.raises(Interrupted, match="SIGINT, all runs saved"):
    run_units(make_units(plan.runs, most=8), Local(), logs=tmp_path / "logs")
  assert (tmp_path / "saved").read_text() == "saved"
  assert {run.state for run in plan.runs} == {"new"}  # nobody failed


def test_a_host_that_hangs_is_killed_and_all_are_started_again(
  tiny_sweep, monkeypatch, tmp_path
):
  """Once another has ended because of it: a stopped process can't end."""
  pretend(
    monkeypatch,
    f"""
import signal
first = {str(tmp_path / "first")!r}
if unit["process_id"] and not os.path.exists(first):
  open(first, "w").close()
  os.kill(os.getpid(), signal.SIGSTOP)
while not os.path.exists(first):
  pass
if unit["process_id"] == 0 and os.path.getsize(first) == 0:
  open(first, "w").write("again")
  sys.exit(75)
{FINISH}
""",
  )
  monkeypatch.setattr(local, "OUTLAST", 0.1)
  plan = tiny_sweep(seeds((0,)))
  units = make_units(plan.runs, most=1)
  run_units(units, Local(), logs=tmp_path / "logs", hosts=2)
  assert [run.state for run in plan.runs] == ["done"]


def test_what_another_process_trains_is_left_to_it(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(monkeypatch, FINISH)
  plan = tiny_sweep()
  with locked([plan.runs[0].lock]):
    run_units(make_units(plan.runs, most=8), Local(), logs=tmp_path / "logs")
    assert [run.state for run in plan.runs] == ["running"] + ["done"] * 5


def work(runs, *, retry_failed=False, patience=0.0):
  """Runs a worker here, as if started with these runs."""
  return worker.main(
    {
      "runs": [
        {
          "config": json.loads(json.dumps(run.config.to_dict())),
          "folder": str(run.folder),
          "lock": str(run.lock),
        }
        for run in runs
      ],
      "inputs": str(runs[0].folder.parents[1] / "inputs"),
      "retry_failed": retry_failed,
      "patience": patience,
      "members": 8,
      "hosts": 1,
    }
  )


def test_a_worker_trains_its_unit(tiny_sweep, monkeypatch):
  given = []
  monkeypatch.setattr(
    "vera_jax.train.ensemble.train_ensemble",
    lambda *group, members, inputs: given.append((*group, members)),
  )
  runs = tiny_sweep(seeds((0, 1, 2))).runs
  with locked([runs[2].lock]):
    assert work(runs) == 0
    assert runs[2].lock.exists()
  ((configs, folders, members),) = given
  assert members == 8
  assert folders == [run.folder for run in runs[:2]]
  assert not any(run.lock.exists() for run in runs)
  for config, run in zip(configs, runs[:2], strict=True):
    check_settings(config)  # through JSON it is the same config
    assert group_key(config) == group_key(run.config)
    assert config.seed == run.config.seed


@pytest.mark.parametrize("error", [MemoryError("too much"), KeyError("odd")])
def test_whatever_ends_a_worker_is_noted_in_the_folders(
  tiny_sweep, monkeypatch, error
):
  def fail(configs, folders, **options):
    folders[0].mkdir(parents=True)
    results.write(folders[0], {"score": 1.0})  # was done before the others
    raise error

  monkeypatch.setattr("vera_jax.train.ensemble.train_ensemble", fail)
  plan = tiny_sweep(seeds((0, 1)))
  assert work(plan.runs) == 1
  assert [run.state for run in plan.runs] == ["done", "failed"]
  assert type(error).__name__ in plan.runs[1].failure()


def test_a_full_disk_is_no_failure_of_a_run(tiny_sweep, monkeypatch):
  """So the same command goes on, without --retry_failed."""

  def fill(configs, folders, **options):
    folders[0].mkdir(parents=True)
    raise DiskFull("free some space")

  monkeypatch.setattr("vera_jax.train.ensemble.train_ensemble", fill)
  plan = tiny_sweep(seeds((0, 1)))
  assert work(plan.runs) == 1
  assert [run.state for run in plan.runs] == ["new", "new"]


def test_a_worker_takes_what_is_left(tiny_sweep, monkeypatch):
  plan = tiny_sweep()
  done, failed, *left = plan.runs
  for run, file in ((done, results.FILE), (failed, results.FAILED)):
    run.folder.mkdir(parents=True)
    results.write(run.folder, {}, file)
  taken = []
  monkeypatch.setattr(
    worker, "train", lambda runs, task: taken.append(runs) or 0
  )
  work(plan.runs)
  work(plan.runs, retry_failed=True)
  names = [[run["lock"] for run in runs] for runs in taken]
  assert names[0] == [str(run.lock) for run in left]
  assert names[1] == [str(run.lock) for run in (failed, *left)]
  assert work([done]) == 0 and len(taken) == 2


def test_a_closed_input_stops_a_worker_once(monkeypatch):
  sent = []
  monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
  end, start = os.pipe()
  before = signal.signal(signal.SIGTERM, worker.leave)
  try:
    thread = threading.Thread(target=worker.stop_when_closed, args=[end])
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and sent == []  # the sweep is there
    os.close(start)
    thread.join()
    assert sent == [(os.getpid(), signal.SIGTERM)]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as after the first one
    worker.stop_when_closed(end)
    assert len(sent) == 1
  finally:
    signal.signal(signal.SIGTERM, before)
    os.close(end)


def test_a_worker_notes_in_every_folder_why_it_could_not(
  tiny_sweep, tmp_path, capsys
):
  plan = tiny_sweep(seeds((0, 1)), data__source=str(tmp_path / "nowhere"))
  assert work(plan.runs) == 1
  for run in plan.runs:
    assert run.state == "failed" and "nowhere" in run.failure()
  assert "Traceback" not in capsys.readouterr().err


def test_a_failure_that_can_not_be_written_down_ends_the_sweep(
  tiny_sweep, monkeypatch, tmp_path
):
  """On a full disk the units after it would end alike."""
  pretend(monkeypatch, "sys.exit(1)")
  plan = tiny_sweep()
  with pytest.raises(UserError, match="is the disk full"):
    run_units(make_units(plan.runs, most=8), Local(), logs=tmp_path / "logs")
  assert {run.state for run in plan.runs} == {"new"}


def test_a_sweep_in_a_store_has_its_logs_there(tiny_sweep, monkeypatch, bucket):
  plan = tiny_sweep(seeds((0,)), folder=f"{bucket}/test-runner")
  pretend(
    monkeypatch, "print('last words', flush=True); os.kill(os.getpid(), 9)"
  )
  units, logs = make_units(plan.runs, most=8), plan.folder / "logs"
  for retry_failed in (False, True):
    run_units(units, Local(), logs=logs, retry_failed=retry_failed)
    (run,) = plan.runs
    assert run.state == "failed" and "last words" in run.failure()
    assert f"{logs}/{run.name}.log" in run.failure()
  text = (logs / f"{run.name}.log").read_text()
  assert text == "last words\n" * 2
