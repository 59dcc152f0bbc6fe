"""Train a sweep's units as tasks of a Ray cluster."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Outcome
from vera_jax.sweep.launchers.process import GRACE, Worker, free_port, task_of
from vera_jax.sweep.plan import Unit
from vera_jax.sweep.worker import LOST
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted

try:
  import ray
  from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
  )
  from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
  raise UserError(
    "--launcher=ray needs Ray: pip install -r requirements-ray.txt"
  ) from error

POLL = 1.0  # seconds between looks at the user's wish to stop
RETRIES = 20  # nodes that may be lost under one unit
OPTIONS = ("num_cpus", "num_gpus", "TPU", "memory")  # of each process
NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}  # in a group of nodes


class Lost(Exception):
  """A worker did not come to its end."""


def train(
  task: dict[str, Any], coordinator: str | None = None, number: int = 0
) -> int:
  """A unit's worker as Ray's task; the arguments are `Worker`'s.

  Raises:
    Lost: it was stopped, and not by the sweep, or another host's was.
  """
  # Ray starts its own processes elsewhere: their child imports what they do
  os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
  worker = Worker(task, coordinator, number)
  try:
    code = worker.wait()
  except KeyboardInterrupt:  # by ray.cancel
    worker.stop()
    return worker.wait()
  if code in (EXIT_CODE, LOST):
    raise Lost(f"exit code {code}")
  return code


def address() -> str:
  """Where the first of a unit's processes listens, asked on its node."""
  return f"{ray.util.get_node_ip_address()}:{free_port()}"


class Job:
  """A unit's task, or its tasks: one for each host, which need each other."""

  def __init__(
    self, unit: Unit, task: dict[str, Any], needs: Mapping[str, float]
  ) -> None:
    self.unit, self._task, self._needs = unit, task, dict(needs)
    self.starts = 0
    self._group: PlacementGroup | None = None

  def start(self) -> list[ray.ObjectRef]:
    self.starts, self.code, self.reason = self.starts + 1, 0, ""
    tpus = self._needs.get("TPU")
    numbers = {key: x for key, x in self._needs.items() if key != "TPU"}
    options = {**numbers, "resources": {"TPU": tpus} if tpus else {}}
    hosts = self._task["hosts"]
    if hosts == 1:
      # Ray itself starts it again, on another node
      remote = ray.remote(train).options(
        max_retries=RETRIES, retry_exceptions=[Lost], **options
      )
      return [remote.remote(self._task)]
    needs = {NAMES.get(key, key): x for key, x in self._needs.items()}
    self._group = placement_group([needs] * hosts, strategy="STRICT_SPREAD")
    nodes = [
      PlacementGroupSchedulingStrategy(self._group, number)
      for number in range(hosts)
    ]
    first = ray.remote(address).options(
      num_cpus=0, scheduling_strategy=nodes[0]
    )
    coordinator = first.remote()
    return [
      ray.remote(train)
      .options(max_retries=0, scheduling_strategy=node, **options)
      .remote(self._task, coordinator, number)
      for number, node in enumerate(nodes)
    ]

  def note_end(self, ref: ray.ObjectRef) -> None:
    """Take in how one of its tasks ended."""
    try:
      self.code = max(self.code, ray.get(ref))
    except ray.exceptions.RayError as error:
      self.code, self.reason = LOST, str(error)

  def free(self) -> None:
    """Give back the nodes of several hosts."""
    if self._group is not None:
      remove_placement_group(self._group)
      self._group = None


class Ray:
  """A launcher; see `launcher.Launcher`. Its tasks end with it."""

  patience = 240.0  # a lock of a node that is lost expires after three minutes

  def __init__(
    self, options: Mapping[str, str], *, logs: Path, hosts: int = 1
  ) -> None:
    """Options are the cluster's `address`, and what each process needs.

    Without an address Ray looks at RAY_ADDRESS, and else starts on this
    machine. A process has one CPU unless the options say otherwise, and one GPU
    where there are any.
    """
    self._logs, self._hosts = logs, hosts
    needs = {key: x for key, x in options.items() if key != "address"}
    try:
      self._needs = {key: float(value) for key, value in needs.items()}
      if unknown := self._needs.keys() - {*OPTIONS}:
        raise ValueError(f"there is no {', '.join(sorted(unknown))}")
    except ValueError as error:
      raise UserError(
        f"--launcher_options: {error}. Ray's are address=HOST:PORT, and as"
        f" numbers {', '.join(OPTIONS)}."
      ) from error
    try:
      if not ray.is_initialized():
        ray.init(options.get("address"), log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
      raise UserError(f"--launcher=ray: {error}") from error
    self._needs.setdefault("num_cpus", 1)
    if "TPU" not in needs and ray.cluster_resources().get("GPU"):
      self._needs.setdefault("num_gpus", 1)

  def run(
    self,
    units: Iterable[Unit],
    *,
    retry_failed: bool,
    stop: Flag,
    say: Callable[[str], None],
  ) -> Generator[Outcome, None, None]:
    pending: dict[ray.ObjectRef, Job] = {}
    for unit in units:
      task = task_of(
        unit,
        logs=self._logs,
        retry_failed=retry_failed,
        patience=self.patience,
        hosts=self._hosts,
      )
      job = Job(unit, task, self._needs)
      pending |= dict.fromkeys(job.start(), job)
    say(f"{len(pending)} tasks are given to Ray")
    try:
      while pending:
        ready, _ = ray.wait(list(pending), timeout=POLL)
        if stop.caught:
          raise Interrupted(
            f"Stopped by {stop.caught.name}; all workers were told to save. The"
            " same command goes on."
          )
        for ref in ready:
          job = pending.pop(ref)
          job.note_end(ref)
          others = [ref for ref in pending if pending[ref] is job]
          if job.code == LOST:  # then they can't go on
            for ref in others:
              ray.cancel(ref)
          if others:
            continue
          job.free()
          if job.code == LOST and job.starts <= RETRIES and self._hosts > 1:
            pending |= dict.fromkeys(job.start(), job)
          else:
            yield Outcome(job.unit, job.code, job.reason)
    finally:  # also when the sweep has seen enough of them fail
      for ref in pending:
        ray.cancel(ref)
      if pending:
        ray.wait(list(pending), num_returns=len(pending), timeout=GRACE)
      for job in pending.values():
        job.free()
