"""Engines start the same workers; what is lost is tried again."""

import os
import subprocess
import sys
import threading

import pytest

from configs.sweeps import seeds
from tests.sweep.test_runner import FINISH, pretend, work
from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.locks import locked
from vera_jax.sweep.launchers.launcher import Outcome, make_launcher
from vera_jax.sweep.plan import make_units
from vera_jax.sweep.runner import IDLE, run_units
from vera_jax.sweep.worker import LOST
from vera_jax.train.preemption import Flag, Interrupted


def test_no_engine_is_imported_unless_chosen():
  code = (
    "import sys, experiments.sweep\n"
    "from vera_jax.sweep.launchers.launcher import make_launcher\n"
    "from pathlib import Path\n"
    "make_launcher('local', {}, logs=Path('logs'))\n"
    "print({'ray', 'submitit', 'gcsfs'} & {*sys.modules})"
  )
  ended = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert ended.stdout == "set()\n"


@pytest.mark.parametrize(
  ("name", "module"), [("slurm", "submitit"), ("ray", "ray")]
)
def test_a_missing_engine_says_what_to_install(
  monkeypatch, tmp_path, name, module
):
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.delitem(
    sys.modules, f"vera_jax.sweep.launchers.{name}", raising=False
  )
  with pytest.raises(UserError, match=f"requirements-{name}.txt"):
    make_launcher(name, {}, logs=tmp_path)


class Unreliable:
  """A launcher that finishes the runs of the last unit, and loses the rest."""

  patience = 0.0

  def __init__(self, finishes: bool = True) -> None:
    self.given: list[list[str]] = []
    self._finishes = finishes

  def run(self, units, *, retry_failed, stop, say):
    units = list(units)
    self.given.append([unit[0].name for unit in units])
    for unit in units[:-1] if self._finishes else units:
      yield Outcome(unit, LOST, "node 7 is gone")
    if self._finishes:
      for run in units[-1]:
        run.folder.mkdir(parents=True)
        results.write(run.folder, {"score": 1.0})
      yield Outcome(units[-1], 0)


def test_what_is_lost_is_given_to_the_engine_again(tiny_sweep):
  plan = tiny_sweep()
  launcher = Unreliable()
  run_units(make_units(plan.runs, most=2), launcher)
  assert [len(names) for names in launcher.given] == [3, 2, 1]
  assert {run.state for run in plan.runs} == {"done"}


def test_what_never_ends_is_said_with_the_last_reason(tiny_sweep):
  plan = tiny_sweep()
  launcher = Unreliable(finishes=False)
  with pytest.raises(UserError, match="node 7 is gone") as caught:
    run_units(make_units(plan.runs, most=8), launcher)
  assert len(launcher.given) == IDLE and plan.runs[0].name in str(caught.value)


def test_a_worker_waits_for_a_lock_and_trains_then(tiny_sweep, monkeypatch):
  """That of a lost machine is free later than the engine starts again."""
  plan = tiny_sweep(seeds((0,)))
  (run,) = plan.runs
  trained = []
  monkeypatch.setattr(
    "vera_jax.train.ensemble.train_ensemble", lambda *x: trained.append(x)
  )
  taken = locked([run.lock])
  taken.__enter__()
  threading.Timer(1.5, lambda: taken.__exit__(None, None, None)).start()
  assert work([run]) == 0 and not trained  # left to the other process
  assert work([run], patience=30.0) == 0 and len(trained) == 1


@pytest.fixture
def cluster(monkeypatch, tmp_path):
  """A PATH with sbatch, squeue and srun; returns where sbatch's scripts are."""
  pytest.importorskip("submitit")
  commands, record = tmp_path / "commands", tmp_path / "record"
  commands.mkdir()
  record.mkdir()
  for name, script in {
    "srun": "",
    "squeue": f"cat {record}/queue 2>/dev/null; rm -f {record}/queue",
    "scancel": f'echo "$@" >> {record}/cancelled',
    "sbatch": f"cp $1 {record}/script\necho Submitted batch job 41",
  }.items():
    file = commands / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
  monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
  return record


def test_slurm_gets_an_array_that_is_requeued(cluster, tiny_sweep, tmp_path):
  plan, lines = tiny_sweep(), []
  options = {"slurm_partition": "gpu", "gpus_per_node": "1", "mem_gb": "16"}
  launcher = make_launcher("slurm", options, logs=tmp_path / "logs", hosts=2)
  units = make_units(plan.runs, most=2)
  launcher.submit(units, retry_failed=False, say=lines.append)
  script = (cluster / "script").read_text()
  for line in (
    "--array=0-2%3",
    "--requeue",
    "--signal=USR2@90",
    "--nodes=2",
    "--ntasks-per-node=1",
    "--gpus-per-node=1",
    "--mem=16GB",
    "--partition=gpu",
    "--time=240",
    "--open-mode=append",
  ):
    assert f"#SBATCH {line}\n" in script
  assert "srun" in script and "submitit.core._submit" in script
  assert lines[1] == f"job 41_1: {', '.join(run.name for run in units[1])}"


def test_a_job_trains_its_unit(cluster, tiny_sweep, monkeypatch, tmp_path):
  """In this process, which is told that it is one of the array."""
  from submitit.core.utils import DelayedSubmission

  pretend(monkeypatch, FINISH)
  plan, logs = tiny_sweep(), tmp_path / "logs"
  launcher = make_launcher("slurm", {}, logs=logs)
  units = make_units(plan.runs, most=2)
  launcher.submit(units, retry_failed=False, say=lambda line: None)
  monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
  monkeypatch.setenv("SLURM_JOB_ID", "42")
  job = DelayedSubmission.load(logs / "slurm/41_1_submitted.pkl")
  assert job.result() == 0
  assert [run.state for run in plan.runs] == ["new"] * 2 + ["done"] * 2 + [
    "new"
  ] * 2
  again = job._checkpoint_function()  # what it is to do after a preemption
  assert again.result() == 0


def test_ctrl_c_leaves_the_jobs_and_an_error_ends_them(
  cluster, tiny_sweep, monkeypatch, tmp_path
):
  monkeypatch.setattr("vera_jax.sweep.launchers.slurm.POLL", 0.01)
  launcher = make_launcher("slurm", {}, logs=tmp_path / "logs")
  units, lines, stop = make_units(tiny_sweep().runs, most=2), [], Flag()

  def start():
    return launcher.run(units, retry_failed=False, stop=stop, say=lines.append)

  monkeypatch.setattr(
    "submitit.SlurmJob.done", lambda job: job.job_id == "41_0"
  )
  monkeypatch.setattr("submitit.SlurmJob.results", lambda job: [1])
  outcomes = start()
  assert next(outcomes) == (units[0], 1, "")
  outcomes.close()  # as the sweep does when the first units fail alike
  ids = (cluster / "cancelled").read_text().split()
  assert ids == ["41_1", "41_2"]

  (cluster / "queue").write_text("39_0\n39_[1-2]\n")  # they still run
  with pytest.raises(UserError, match="39_0 39_"):
    launcher.submit(units, retry_failed=False, say=lines.append)
  (cluster / "queue").write_text("39_0\n39_[1-2]\n")
  outcomes = start()
  assert next(outcomes).unit == units[0]  # once these were gone
  assert "earlier command: 39_0" in lines[3]
  stop.set(2, None)
  with pytest.raises(Interrupted, match="`scancel 41` ends them"):
    next(outcomes)
  assert (cluster / "cancelled").read_text().split() == ids


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("local", {"num_cpus": "2"}, "num_cpus: the local launcher has none"),
    ("slurm", {"slurm_partion": "gpu"}, "partion"),
    ("slurm", {"timeout_min": "2h"}, "timeout_min"),
    ("ray", {"num_gpu": "1"}, "num_gpu.*num_gpus"),
    ("ray", {"TPU": "many"}, "many"),
  ],
)
def test_an_option_that_it_does_not_have_is_named(
  cluster, tmp_path, name, options, words
):
  if name == "ray":
    pytest.importorskip("ray")
  with pytest.raises(UserError, match=words):
    make_launcher(name, options, logs=tmp_path / "logs")


def test_without_slurm_it_says_so(monkeypatch, tmp_path):
  pytest.importorskip("submitit")
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="srun"):
    make_launcher("slurm", {}, logs=tmp_path / "logs")
