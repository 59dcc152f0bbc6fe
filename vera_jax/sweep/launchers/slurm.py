"""Train a sweep's units as jobs of a SLURM cluster, which submitit talks to."""

import hashlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError

from vera_jax.errors import UserError
from vera_jax.places import is_remote
from vera_jax.sweep.launchers.launcher import Outcome, Outcomes, Say, Task
from vera_jax.sweep.launchers.process import GRACE, Worker
from vera_jax.sweep.worker import LOST
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted

POLL = 2.0  # seconds between looks at the jobs
DEFAULTS = {"timeout_min": "240"}  # submitit's own are five minutes
REQUEUES = 1000  # times that a job may come to the end of its time
ENDING = 180.0  # seconds that SLURM may take to end a preempted job
# submitit's, of options and where there is no srun
REFUSALS = AssertionError, NameError, RuntimeError, TypeError, ValueError
PORTS = range(20_000, 60_000)


class Job:
  """What submitit calls in a job's processes: a unit's worker is their child.

  At the end of the job's time submitit sends USR2. The worker, whom SLURM sends
  it as well, ignores that; it is stopped as usual, so that it saves, and the
  job is put back into the queue.
  """

  def __init__(self, message: dict[str, Any]) -> None:
    self._message = message
    self._worker: Worker | None = None

  def __call__(self) -> int:
    job = submitit.JobEnvironment()
    first = None
    if self._message["hosts"] > 1:
      # the same port in all its processes, and another in another job
      first = f"{job.hostnames[0]}:{PORTS[int(job.raw_job_id) % len(PORTS)]}"
    number = signal.Signals[f"SIG{job.USR_SIG}"]
    handler = signal.signal(number, signal.SIG_IGN)  # which a child inherits
    self._worker = worker = Worker(self._message, first, job.global_rank)
    signal.signal(number, handler)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    code = worker.wait()
    if code == EXIT_CODE and job.cluster == "slurm":
      # SLURM sent SIGTERM, and ends the job soon. If that is for another job,
      # it puts this one back into the queue, but not one that ended by itself.
      time.sleep(ENDING)
    return code

  def checkpoint(self) -> submitit.helpers.DelayedSubmission:
    """Called in the signal's handler; returns what the job is to do next."""
    if self._worker is not None:
      self._worker.stop()
      until = time.monotonic() + GRACE
      while not self._worker.has_ended() and time.monotonic() < until:
        pass
    return submitit.helpers.DelayedSubmission(Job(self._message))


class Slurm:
  """A launcher, as `launcher.py` says. Its jobs outlive it."""

  patience = 240.0  # a lock of a node that is lost expires after three minutes

  def __init__(self, options: Mapping[str, str], logs: Path) -> None:
    """Options are those of submitit's AutoExecutor, such as `slurm_partition`.

    With `cluster=local` the jobs are processes of this machine.
    """
    texts = DEFAULTS | dict(options)
    self._cluster = texts.pop("cluster", "slurm")
    values: dict[str, Any] = {
      key: int(text) if text.isdecimal() else text
      for key, text in texts.items()
    }
    self._name = f"sweep-{hashlib.sha256(str(logs).encode()).hexdigest()[:8]}"
    # submitit's own files: beside us, if the sweep is in a store
    folder = Path(self._name) if is_remote(logs) else logs / "slurm"
    try:
      self._executor = submitit.AutoExecutor(
        folder, self._cluster, slurm_max_num_timeout=REQUEUES
      )
      self._executor.update_parameters(
        name=self._name,
        slurm_additional_parameters={"requeue": True},
        nodes=1,  # until the units are known
        tasks_per_node=1,
        **values,
      )
    except REFUSALS as error:
      raise UserError(f"--launcher=slurm: {error}") from error

  def run(self, tasks: Iterable[Task], stop: Flag, say: Say) -> Outcomes:
    if ids := self._queued():
      say(f"waiting for the jobs of an earlier command: {' '.join(ids)}")
      while ids := self._queued():
        self._leave_if(stop, ids)
        time.sleep(POLL)
    waiting = self._submit(list(tasks))
    for job, task in waiting.items():
      say(f"job {job.job_id}: {task}")
    try:
      while waiting:
        for job in [job for job in waiting if job.done()]:
          unit = waiting.pop(job).unit
          try:
            yield Outcome(unit, max(job.results()))
          except UncompletedJobError as error:
            yield Outcome(unit, LOST, str(error))
        self._leave_if(stop, [job.job_id for job in waiting])
        time.sleep(POLL)
    except GeneratorExit:  # the sweep has seen enough of them fail
      for job in waiting:
        job.cancel(check=False)
      raise

  def _submit(self, tasks: list[Task]) -> dict[submitit.Job[int], Task]:
    """An array with a job for each unit."""
    if not tasks:
      return {}
    hosts = tasks[0].message["hosts"]
    # the local executor has but one node
    nodes, each = (1, hosts) if self._cluster == "local" else (hosts, 1)
    self._executor.update_parameters(nodes=nodes, tasks_per_node=each)
    try:
      with self._executor.batch():
        jobs = [self._executor.submit(Job(task.message)) for task in tasks]
    except RuntimeError as error:
      raise UserError(f"sbatch refuses the jobs: {error}") from error
    return dict(zip(jobs, tasks, strict=True))

  def _queued(self) -> list[str]:
    """The jobs of this sweep that SLURM still has, by their numbers."""
    if shutil.which("squeue") is None:
      return []
    command = ["squeue", "--me", f"--name={self._name}"]
    command += ["--noheader", "--format=%i"]
    shown = subprocess.run(command, capture_output=True, text=True)
    return shown.stdout.split()

  def _leave_if(self, stop: Flag, ids: Iterable[str]) -> None:
    if stop.caught and ids:
      arrays = " ".join(dict.fromkeys(name.split("_")[0] for name in ids))
      raise Interrupted(
        f"Stopped by {stop.caught.name}. The jobs go on; the same command waits"
        f" for them again, and `scancel {arrays}` ends them."
      )
