"""Engines start the same workers; what is lost is tried again."""

import os
import signal
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
from vera_jax.train.preemption import Interrupted


def test_no_engine_is_imported_unless_chosen():
  code = (
    "import sys, experiments.sweep\n"
    "from vera_jax.sweep.launchers.launcher import make_launcher\n"
    "from pathlib import Path\n"
    "make_launcher('local', {}, Path('logs'))\n"
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
  with pytest.raises(UserError, match=f"needs {module}: pip install .*{name}"):
    make_launcher(name, {}, tmp_path)


class Unreliable:
  """A launcher that finishes the runs of the last unit, and loses the rest."""

  patience = 0.0

  def __init__(self, finishes: bool = True) -> None:
    self.given: list[list[str]] = []
    self._finishes = finishes

  def run(self, tasks, stop, say):
    units = [task.unit for task in tasks]
    self.given.append([unit[0].name for unit in units])
    for unit in units[:-1] if self._finishes else units:
      yield Outcome(unit, LOST, "node 7 is gone")
    if self._finishes:
      for run in units[-1]:
        run.folder.mkdir(parents=True)
        results.write(run.folder, {"score": 1.0})
      yield Outcome(units[-1], 0)


def test_what_is_lost_is_given_to_the_engine_again(tiny_sweep, tmp_path):
  plan = tiny_sweep()
  launcher = Unreliable()
  run_units(make_units(plan.runs, most=2), launcher, logs=tmp_path)
  assert [len(names) for names in launcher.given] == [3, 2, 1]
  assert {run.state for run in plan.runs} == {"done"}


def test_what_never_ends_is_said_with_the_last_reason(tiny_sweep, tmp_path):
  plan = tiny_sweep()
  launcher = Unreliable(finishes=False)
  with pytest.raises(UserError, match="node 7 is gone") as caught:
    run_units(make_units(plan.runs, most=8), launcher, logs=tmp_path)
  assert len(launcher.given) == IDLE and plan.runs[0].name in str(caught.value)


def test_a_worker_waits_for_a_lock_and_trains_then(tiny_sweep, monkeypatch):
  """That of a lost machine is free later than the engine starts again."""
  plan = tiny_sweep(seeds((0,)))
  (run,) = plan.runs
  trained = []
  monkeypatch.setattr(
    "vera_jax.train.ensemble.train_ensemble",
    lambda *x, **options: trained.append(x),
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


@pytest.fixture(autouse=True)
def same_signals():
  """A job's process handles SIGTERM to its end."""
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.fixture
def launched(cluster, tiny_sweep, monkeypatch, tmp_path):
  """Starts a sweep's three units by SLURM, where some jobs fail.

  Returns the runs, what was said, and the error that ended it. It is told to
  stop when it asks for the job `stop_at`.
  """
  monkeypatch.setattr("vera_jax.sweep.launchers.slurm.POLL", 0.01)
  plan = tiny_sweep()

  units = make_units(plan.runs, most=2)

  def launch(*, failed=(), stop_at=None, hosts=1, **options):
    lines = []

    def has_ended(job):
      if job.job_id == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      return job.job_id in failed

    def fail(job):
      for run in units[int(job.job_id[-1])]:
        run.folder.mkdir(parents=True)
        results.write(run.folder, {"failed": "no such folder"}, results.FAILED)
      return [1]

    monkeypatch.setattr("submitit.SlurmJob.done", has_ended)
    monkeypatch.setattr("submitit.SlurmJob.results", fail)
    launcher = make_launcher("slurm", options, tmp_path / "logs")
    with pytest.raises((UserError, Interrupted)) as caught:
      run_units(
        units,
        launcher,
        logs=tmp_path / "logs",
        hosts=hosts,
        say=lines.append,
      )
    return plan.runs, lines, caught.value

  return launch


def test_slurm_gets_an_array_that_is_requeued(cluster, launched):
  options = {"slurm_partition": "gpu", "gpus_per_node": "1", "mem_gb": "16"}
  runs, lines, error = launched(stop_at="41_2", hosts=2, **options)
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
  assert lines[1] == f"job 41_1: {runs[2].name}, {runs[3].name}"
  # Ctrl-C, or SIGTERM as here, leaves them to SLURM
  assert isinstance(error, Interrupted)
  assert "`scancel 41` ends them" in str(error)
  assert not (cluster / "cancelled").exists()


def test_a_job_trains_its_unit(launched, monkeypatch, tmp_path):
  """In this process, which is told that it is one of the array."""
  from submitit.core.utils import DelayedSubmission

  runs, _, _ = launched(stop_at="41_2")
  pretend(monkeypatch, FINISH)
  monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
  monkeypatch.setenv("SLURM_JOB_ID", "42")
  job = DelayedSubmission.load(tmp_path / "logs/slurm/41_1_submitted.pkl")
  assert job.result() == 0
  states = [run.state for run in runs]
  assert states == ["new"] * 2 + ["done"] * 2 + ["new"] * 2


def test_the_end_of_its_time_stops_a_worker_and_requeues(
  launched, monkeypatch, tmp_path
):
  """SLURM sends USR2 to all processes of a job; submitit has it handled."""
  from submitit.core.utils import DelayedSubmission

  launched(stop_at="41_2")
  saved = tmp_path / "saved"
  pretend(
    monkeypatch,
    f"""
import signal
os.kill(os.getpid(), signal.SIGUSR2)  # ends who doesn't ignore it
os.kill(os.getppid(), signal.SIGUSR2)
sys.stdin.read()
open({str(saved)!r}, "w").write("saved")
sys.exit(75)
""",
  )
  monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
  monkeypatch.setenv("SLURM_JOB_ID", "42")
  monkeypatch.setattr("vera_jax.sweep.launchers.slurm.ENDING", 0.0)
  job = DelayedSubmission.load(tmp_path / "logs/slurm/41_0_submitted.pkl")
  again = []
  before = signal.signal(
    signal.SIGUSR2, lambda *_: again.append(job._checkpoint_function())
  )
  try:
    assert job.result() == 75
  finally:
    signal.signal(signal.SIGUSR2, before)
  assert saved.read_text() == "saved"
  pretend(monkeypatch, FINISH)
  assert again[0].result() == 0


def test_what_fails_alike_ends_the_other_jobs(cluster, launched, monkeypatch):
  monkeypatch.setattr("vera_jax.sweep.runner.SAME", 1)
  _, _, error = launched(failed=["41_0"])
  assert "no such folder" in str(error)
  assert (cluster / "cancelled").read_text().split() == ["41_1", "41_2"]


def test_the_jobs_of_an_earlier_command_are_waited_for(cluster, launched):
  (cluster / "queue").write_text("39_0\n39_[1-2]\n")
  _, lines, _ = launched(stop_at="41_2")
  assert lines[0] == (
    "waiting for the jobs of an earlier command: 39_0 39_[1-2]"
  )
  assert lines[1].startswith("job 41_0: ")


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("local", {"num_cpus": "2"}, "num_cpus: the local launcher has none"),
    ("slurm", {"slurm_partion": "gpu"}, "partion"),
    ("slurm", {"timeout_min": "2h"}, "timeout_min"),
    ("slurm", {"nodes": "3"}, "'nodes'"),
    ("ray", {"num_gpu": "1"}, "num_gpu.*num_gpus"),
    ("ray", {"TPU": "many"}, "many"),
    ("ray", {"TPU": "3"}, "TPU"),
  ],
)
def test_an_option_that_it_does_not_have_is_named(
  cluster, tmp_path, name, options, words
):
  if name == "ray":
    pytest.importorskip("ray")
  with pytest.raises(UserError, match=words):
    make_launcher(name, options, tmp_path / "logs")


def test_without_slurm_it_says_so(monkeypatch, tmp_path):
  pytest.importorskip("submitit")
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="srun"):
    make_launcher("slurm", {}, tmp_path / "logs")
