"""Train a sweep's units as tasks of a Ray cluster."""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
  PlacementGroupSchedulingStrategy as InGroup,
)

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Outcome, Outcomes, Say, Task
from vera_jax.sweep.launchers.process import GRACE, Worker, free_port
from vera_jax.sweep.worker import LOST
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted

POLL = 1.0  # seconds between looks at the user's wish to stop
RETRIES = 20  # nodes that may be lost under one unit
# What each process needs, by the name that a cluster has for it.
NEEDS = {"num_cpus": "CPU", "num_gpus": "GPU", "TPU": "TPU", "memory": "memory"}


@ray.remote(max_retries=0)  # several hosts start again together, or not at all
def train(message: dict[str, Any], first: str | None, number: int) -> int:
  """A unit's worker in a task; the arguments are `Worker`'s."""
  # Ray started its process in its own way: a child imports from there as well
  os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
  worker = Worker(message, first, number)
  try:
    code = worker.wait()
  except KeyboardInterrupt:  # by ray.cancel
    worker.stop()
    code = worker.wait()
  return LOST if code == EXIT_CODE else code


@ray.remote
def first_address() -> str:
  """Where the first of a unit's processes listens, asked on its node."""
  return f"{ray.util.get_node_ip_address()}:{free_port()}"


def as_options(needs: Mapping[str, float]) -> dict[str, Any]:
  """What a process needs, as Ray's tasks take it."""
  others = {key: number for key, number in needs.items() if key != "TPU"}
  return others | {"resources": {k: needs[k] for k in ("TPU",) if k in needs}}


class Job:
  """A unit's task; with several hosts its tasks, which end together."""

  def __init__(self, task: Task, needs: Mapping[str, float]) -> None:
    self.unit, self._message = task.unit, task.message
    self.starts, self._needs = 0, needs
    self._group: Any = None

  def start(self) -> dict[ray.ObjectRef, "Job"]:
    self.starts, self.code, self.reason = self.starts + 1, 0, ""
    first: Any = None
    nodes: list[Any] = ["DEFAULT"]
    if (hosts := self._message["hosts"]) > 1:
      needs = {NEEDS[key]: value for key, value in self._needs.items()}
      self._group = placement_group([needs] * hosts, strategy="STRICT_SPREAD")
      nodes = [InGroup(self._group, number) for number in range(hosts)]
      asked = first_address.options(num_cpus=0, scheduling_strategy=nodes[0])
      first = asked.remote()  # Ray hands its result to the others
    return {
      train.options(scheduling_strategy=node, **as_options(self._needs)).remote(
        self._message, first, number
      ): self
      for number, node in enumerate(nodes)
    }

  def end(self, ref: ray.ObjectRef, others: list[ray.ObjectRef]) -> None:
    """Note how a task ended; then the others can't go on, if it was lost."""
    try:
      self.code = max(self.code, ray.get(ref))
    except ray.exceptions.RayError as error:  # such as a lost node
      self.code, self.reason = LOST, str(error)
    if others and self.code == LOST:
      for other in others:
        ray.cancel(other)
    elif not others and self._group:
      remove_placement_group(self._group)


class Ray:
  """A launcher, as `launcher.py` says. Its tasks end with it."""

  patience = 240.0  # a lock of a node that is lost expires after three minutes

  def __init__(self, options: Mapping[str, str], logs: Path) -> None:
    """Options are the cluster's `address`, and what each process needs.

    Without an address Ray looks at RAY_ADDRESS, and else starts on this
    machine. A process has one CPU unless the options say otherwise, and one GPU
    where there are any.
    """
    del logs  # they are written where the workers are
    texts = dict(options)
    try:
      address = texts.pop("address", None)
      self._needs = {key: float(text) for key, text in texts.items()}
      if unknown := texts.keys() - NEEDS:
        raise ValueError(f"there is no {', '.join(sorted(unknown))}")
      train.options(**as_options(self._needs))  # which checks the numbers
      ray.init(address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
      raise UserError(
        f"--launcher=ray: {error}. Its --launcher_options are address=HOST:PORT"
        f" and, as numbers, {', '.join(NEEDS)}."
      ) from error
    self._needs.setdefault("num_cpus", 1)
    if "TPU" not in texts and ray.cluster_resources().get("GPU"):
      self._needs.setdefault("num_gpus", 1)

  def run(self, tasks: Iterable[Task], stop: Flag, say: Say) -> Outcomes:
    pending: dict[ray.ObjectRef, Job] = {}
    for task in tasks:
      pending |= Job(task, self._needs).start()
    say(f"{len(pending)} tasks are given to Ray")
    try:
      while pending:
        ready, _ = ray.wait(list(pending), timeout=POLL)
        if stop.caught:
          raise Interrupted(
            f"Stopped by {stop.caught.name}; all workers had to save. The"
            " same command goes on."
          )
        for ref in ready:
          job = pending.pop(ref)
          others = [other for other in pending if pending[other] is job]
          job.end(ref, others)
          if not others and job.code == LOST and job.starts <= RETRIES:
            pending |= job.start()
          elif not others:
            yield Outcome(job.unit, job.code, job.reason)
    finally:  # also when the sweep has seen enough of them fail
      for ref in pending:
        ray.cancel(ref)
      if pending:
        ray.wait(list(pending), num_returns=len(pending), timeout=GRACE)
