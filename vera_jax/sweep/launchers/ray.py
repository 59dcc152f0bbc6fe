"""Train a sweep's units as tasks of a Ray cluster."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Outcome, Outcomes, Task
from vera_jax.sweep.launchers.process import GRACE, Worker, free_port
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
# What each process needs, by the name that a cluster has for it.
NEEDS = {"num_cpus": "CPU", "num_gpus": "GPU", "TPU": "TPU", "memory": "memory"}


def train(message: dict[str, Any], first: str | None, number: int) -> int:
  """A unit's worker in a task; the arguments are `Worker`'s."""
  # Ray's own process was started elsewhere: its child imports what it does
  os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
  worker = Worker(message, first, number)
  try:
    code = worker.wait()
  except KeyboardInterrupt:  # by ray.cancel
    worker.stop()
    code = worker.wait()
  return LOST if code == EXIT_CODE else code


def address() -> str:
  """Where the first of a unit's processes listens, asked on its node."""
  return f"{ray.util.get_node_ip_address()}:{free_port()}"


class Job:
  """A unit's task; with several hosts its tasks, which end together."""

  def __init__(self, task: Task, needs: Mapping[str, float]) -> None:
    self.unit, self._message, self._needs = task.unit, task.message, needs
    self.starts = 0
    self._group: PlacementGroup | None = None

  def start(self) -> list[ray.ObjectRef]:
    self.starts, self.code, self.reason = self.starts + 1, 0, ""
    hosts = self._message["hosts"]
    first: Any = None  # a text, once it is known
    nodes: list[Any] = ["DEFAULT"]
    options: dict[str, Any] = dict(self._needs)
    if tpus := options.pop("TPU", 0):
      options["resources"] = {"TPU": tpus}
    if hosts > 1:
      needs = {NEEDS[key]: value for key, value in self._needs.items()}
      group = placement_group([needs] * hosts, strategy="STRICT_SPREAD")
      nodes = [PlacementGroupSchedulingStrategy(group, n) for n in range(hosts)]
      self._group = group
      asked = ray.remote(address).options(
        num_cpus=0, scheduling_strategy=nodes[0]
      )
      first = asked.remote()
    return [
      ray.remote(train)
      .options(max_retries=0, scheduling_strategy=node, **options)
      .remote(self._message, first, number)
      for number, node in enumerate(nodes)
    ]

  def note_end(self, ref: ray.ObjectRef) -> None:
    """Of one of its tasks."""
    try:
      self.code = max(self.code, ray.get(ref))
    except ray.exceptions.RayError as error:  # such as a lost node
      self.code, self.reason = LOST, str(error)

  def free(self) -> None:
    """Give back the nodes of several hosts."""
    if self._group is not None:
      remove_placement_group(self._group)
      self._group = None


class Ray:
  """A launcher, as `launcher.py` says. Its tasks end with it."""

  patience = 240.0  # a lock of a node that is lost expires after three minutes

  def __init__(self, options: Mapping[str, str]) -> None:
    """Options are the cluster's `address`, and what each process needs.

    Without an address Ray looks at RAY_ADDRESS, and else starts on this
    machine. A process has one CPU unless the options say otherwise, and one GPU
    where there are any.
    """
    needs = {key: x for key, x in options.items() if key != "address"}
    try:
      self._needs = {key: float(value) for key, value in needs.items()}
      if unknown := needs.keys() - NEEDS:
        raise ValueError(f"there is no {', '.join(sorted(unknown))}")
    except ValueError as error:
      raise UserError(
        f"--launcher_options: {error}. Ray's are address=HOST:PORT, and as"
        f" numbers {', '.join(NEEDS)}."
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
    self, tasks: Iterable[Task], stop: Flag, say: Callable[[str], None]
  ) -> Outcomes:
    pending: dict[ray.ObjectRef, Job] = {}
    for task in tasks:
      job = Job(task, self._needs)
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
            for other in others:
              ray.cancel(other)
          if others:
            continue
          job.free()
          if job.code == LOST and job.starts <= RETRIES:
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
