"""Train a sweep's units on this machine, one after another."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Outcome, Outcomes, Say, Task
from vera_jax.sweep.launchers.process import OUTLAST, Worker, free_port
from vera_jax.sweep.plan import NEW, UNFINISHED
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted


class Local:
  """A launcher, as `launcher.py` says; several hosts are several processes."""

  patience = 0.0  # runs that another process is training are left to it

  def __init__(
    self, options: Mapping[str, str] = {}, logs: Path | None = None
  ) -> None:
    del logs
    if options:
      raise UserError(
        f"--launcher_options={','.join(options)}: the local launcher has none."
      )

  def run(self, tasks: Iterable[Task], stop: Flag, say: Say) -> Outcomes:
    for task in tasks:
      say(f"training {task}")
      first, hosts = f"localhost:{free_port()}", task.message["hosts"]
      workers = [Worker(task.message, first, n) for n in range(hosts)]
      while not all([worker.has_ended() for worker in workers]):
        failed = any(worker.has_failed() for worker in workers)
        for worker in workers:
          if stop.caught:
            worker.stop()
          elif failed:  # the others end by themselves, unless one hangs
            worker.kill_in(OUTLAST)
      code = max(worker.wait() for worker in workers)
      if code == 1 and any(r.state in (NEW, UNFINISHED) for r in task.unit):
        raise UserError(
          f"{task.unit[0].name} ended without a result, and why could not be"
          " written into its folder: is the disk full? What it printed is in"
          f" {task.message['log']}.log. The same command goes on."
        )
      yield Outcome(task.unit, code)
      if stop.caught or code == EXIT_CODE:
        name = stop.caught.name if stop.caught else "a signal"
        how = "all runs saved. The same command goes on."
        if code not in (0, EXIT_CODE):
          how = (
            "but the worker ended before it had saved. The same command goes on"
            " from the last saves, and with --retry_failed also with runs that"
            " failed."
          )
        raise Interrupted(f"Stopped by {name}, {how}")
