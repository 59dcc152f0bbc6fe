"""Workers are started, waited for, and their ends understood."""

import io
import json
import os
import signal
import sys

import pytest

from configs.sweeps import product, seeds
from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.sweep import conduct as module
from vera_jax.sweep import worker
from vera_jax.sweep.conduct import Watcher, conduct
from vera_jax.sweep.lock import held
from vera_jax.sweep.plan import units
from vera_jax.train.interrupt import Interrupted


def pretend(monkeypatch, code):
  """Workers run this instead; `unit` is what they are told."""
  start = "import json, os, signal, sys, time; unit = json.load(sys.stdin)\n"
  monkeypatch.setattr(module, "WORKER", [sys.executable, "-c", start + code])
  monkeypatch.setattr(module, "POLL", 0.05)


FINISH = """
for run in unit["runs"]:
  os.makedirs(run["folder"], exist_ok=True)
  open(run["folder"] + "/result.json", "a").write("{}")
"""


def test_every_run_is_trained_once(tiny_sweep, monkeypatch, tmp_path):
  pretend(monkeypatch, FINISH)
  plan = tiny_sweep()
  parts = units(plan.runs, members=8)
  conduct(parts, logs=tmp_path / "logs")
  conduct(parts, logs=tmp_path / "logs", retry_failed=True)
  assert {run.state for run in plan.runs} == {"done"}
  for run in plan.runs:  # a second time would have appended
    assert (run.folder / results.FILE).read_text() == "{}"


def test_a_killed_worker_fails_and_is_retried_on_demand(
  tiny_sweep, monkeypatch, tmp_path
):
  plan = tiny_sweep()
  parts = units(plan.runs, members=8)
  pretend(
    monkeypatch,
    "if unit['runs'][0]['config']['method'] == 'lora':\n"
    "  print('last words', flush=True); os.kill(os.getpid(), 9)\n" + FINISH,
  )
  conduct(parts, logs=tmp_path / "logs")
  states = [run.state for run in plan.runs]
  assert states == ["done"] * 4 + ["failed"] * 2
  for words in ("SIGKILL", "--members=1", "last words"):
    assert words in plan.runs[-1].failure()
  pretend(monkeypatch, FINISH)
  conduct(parts, logs=tmp_path / "logs")
  assert plan.runs[-1].state == "failed"
  conduct(parts, logs=tmp_path / "logs", retry_failed=True)
  assert plan.runs[-1].state == "done"


def test_what_fails_at_once_everywhere_ends_the_sweep(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(
    monkeypatch,
    """
for run in unit["runs"]:
  os.makedirs(run["folder"])
  told = {"failed": "no such folder: glue"}
  open(run["folder"] + "/failed.json", "w").write(json.dumps(told))
sys.exit(1)
""",
  )
  plan = tiny_sweep(product({"vera.rank": (1, 2, 3, 4, 5)}))
  with pytest.raises(UserError, match="no such folder: glue") as told:
    conduct(units(plan.runs, members=8), logs=tmp_path / "logs")
  assert "--retry_failed" in str(told.value)
  assert [run.state for run in plan.runs] == ["failed"] * 3 + ["new"] * 2


def test_a_signal_is_passed_on_and_waited_for(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(
    monkeypatch,
    """
def stop(*_):
  open("{}", "w").write("saved")
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open("{}", "w").write("")
time.sleep(60)
""".format(tmp_path / "saved", tmp_path / "ready"),
  )

  class Impatient(Watcher):
    sent = False

    def tick(self):
      if (tmp_path / "ready").exists() and not self.sent:
        self.sent = True
        os.kill(os.getpid(), signal.SIGINT)

  plan = tiny_sweep()
  with pytest.raises(Interrupted, match="SIGINT, all runs saved"):
    conduct(
      units(plan.runs, members=8), logs=tmp_path / "logs", watcher=Impatient()
    )
  assert (tmp_path / "saved").read_text() == "saved"
  assert {run.state for run in plan.runs} == {"new"}  # nobody failed


def test_what_another_process_trains_is_left_to_it(
  tiny_sweep, monkeypatch, tmp_path
):
  pretend(monkeypatch, FINISH)
  plan = tiny_sweep()
  with held([plan.runs[0].lock]):
    conduct(units(plan.runs, members=8), logs=tmp_path / "logs")
    assert [run.state for run in plan.runs] == ["running"] + ["done"] * 5


def unit_of(runs, *, retry_failed=False):
  told = [module._as_json(run) for run in runs]
  return json.dumps({"runs": told, "retry_failed": retry_failed})


def work(monkeypatch, runs, **settings):
  monkeypatch.setattr(sys, "stdin", io.StringIO(unit_of(runs, **settings)))
  return worker.main()


def test_a_worker_trains_its_unit(tiny_sweep, monkeypatch):
  run, other = tiny_sweep(seeds((0, 1)), optim__batch_size=20).runs
  with held([other.lock]):
    assert work(monkeypatch, [run, other]) == 0
  assert (run.state, other.state) == ("done", "new")
  assert not run.lock.exists()
  result = results.read(run.folder)
  norms = {(v["layer"], v["kind"], v["leaf"]) for v in result["norms"]}
  assert norms == {
    (layer, kind, leaf)
    for layer in (0, 1)
    for kind in ("query", "value")
    for leaf in "db"
  }


@pytest.mark.parametrize("error", [MemoryError("too much"), KeyError("odd")])
def test_whatever_ends_a_worker_is_told_in_the_folders(
  tiny_sweep, monkeypatch, error
):
  def fail(configs, folders):
    folders[0].mkdir(parents=True)
    results.write(folders[0], {"score": 1.0})  # was done before the others
    raise error

  monkeypatch.setattr("vera_jax.train.loop.train_members", fail)
  plan = tiny_sweep(seeds((0, 1)))
  assert work(monkeypatch, plan.runs) == 1
  assert [run.state for run in plan.runs] == ["done", "failed"]
  assert type(error).__name__ in plan.runs[1].failure()


def test_a_worker_takes_what_is_left(tiny_sweep, monkeypatch):
  plan = tiny_sweep()
  done, failed, *left = plan.runs
  for run, file in ((done, results.FILE), (failed, results.FAILED)):
    run.folder.mkdir(parents=True)
    results.write(run.folder, {}, file)
  taken = []
  monkeypatch.setattr(worker, "train", lambda runs: taken.append(runs) or 0)
  work(monkeypatch, plan.runs)
  work(monkeypatch, plan.runs, retry_failed=True)
  names = [[run["lock"] for run in runs] for runs in taken]
  assert names[0] == [str(run.lock) for run in left]
  assert names[1] == [str(run.lock) for run in (failed, *left)]
  assert work(monkeypatch, [done]) == 0 and len(taken) == 2


def test_a_worker_whose_parent_is_gone_is_told_once(monkeypatch):
  told = []
  monkeypatch.setattr(os, "kill", lambda *what: told.append(what))
  follower = worker.Follower()
  follower.look()
  assert told == []
  monkeypatch.setattr(os, "getppid", lambda: 1)
  follower.look()
  follower.look()
  assert told == [(os.getpid(), signal.SIGTERM)]


def test_a_worker_tells_every_folder_why_it_could_not(
  tiny_sweep, monkeypatch, tmp_path, capsys
):
  plan = tiny_sweep(seeds((0, 1)), data__source=str(tmp_path / "nowhere"))
  assert work(monkeypatch, plan.runs) == 1
  for run in plan.runs:
    assert run.state == "failed" and "nowhere" in run.failure()
  assert "Traceback" not in capsys.readouterr().err
