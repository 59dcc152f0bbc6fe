"""Train a sweep's units on this machine, one after another."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from vera_jax.errors import UserError
from vera_jax.sweep.launchers.launcher import Outcome
from vera_jax.sweep.launchers.process import Worker, free_port, task_of
from vera_jax.sweep.plan import NEW, UNFINISHED, Unit
from vera_jax.train.preemption import EXIT_CODE, Flag, Interrupted


class Local:
  """A launcher; see `launcher.Launcher`."""

  patience = 0.0  # runs that another process is training are left to it

  def __init__(self, *, logs: Path, hosts: int = 1) -> None:
    """Several `hosts` are as many processes on this machine."""
    self._logs, self._hosts = logs, hosts

  def run(
    self,
    units: Iterable[Unit],
    *,
    retry_failed: bool,
    stop: Flag,
    say: Callable[[str], None],
  ) -> Generator[Outcome, None, None]:
    for unit in units:
      say(f"training {', '.join(run.name for run in unit)}")
      task = task_of(
        unit, logs=self._logs, retry_failed=retry_failed, hosts=self._hosts
      )
      coordinator = f"localhost:{free_port()}" if self._hosts > 1 else None
      workers = [Worker(task, coordinator, n) for n in range(self._hosts)]
      while not all([worker.has_ended() for worker in workers]):
        if stop.caught:
          for worker in workers:
            worker.stop()
      code = max(worker.wait() for worker in workers)
      if code == 1 and any(run.state in (NEW, UNFINISHED) for run in unit):
        raise UserError(
          f"{unit[0].name} ended without a result, and why could not be written"
          f" into its folder: is the disk full? What it printed is in"
          f" {self._logs}. The same command goes on."
        )
      yield Outcome(unit, code)
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
