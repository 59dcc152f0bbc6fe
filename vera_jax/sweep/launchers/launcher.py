"""What a sweep asks of whoever starts its workers, and the choice by name."""

from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from vera_jax.errors import UserError
from vera_jax.sweep.plan import Unit
from vera_jax.train.preemption import Flag

NAMES = ("local", "slurm", "ray")


class Outcome(NamedTuple):
  """How a unit's worker ended; the runs' folders say how each of them did.

  Attributes:
    unit: its runs.
    code: the exit code, as `worker.py` has it.
    reason: why it was lost, if it was.
  """

  unit: Unit
  code: int
  reason: str = ""


@runtime_checkable
class Launcher(Protocol):
  """Starts a worker for each unit, where and when it has room.

  Attributes:
    patience: seconds that a worker waits for runs that another process has.
  """

  patience: float

  def run(
    self,
    units: Iterable[Unit],
    *,
    retry_failed: bool,
    stop: Flag,
    say: Callable[[str], None],
  ) -> Generator[Outcome, None, None]:
    """Train units; each outcome as it comes.

    Args:
      units: runs that are to be trained, looked up when they can be started.
      retry_failed: whether failed runs among them are tried again.
      stop: set when the user wants to stop.
      say: takes a line that says what was started.

    Raises:
      Interrupted: `stop` was set; the text says what becomes of the units.
      UserError: they can't be started.
    """
    ...


def make_launcher(
  name: str, options: Mapping[str, str], *, logs: Path, hosts: int = 1
) -> Launcher:
  """The launcher of a name; what it needs is imported only now.

  Args:
    name: one of `NAMES`.
    options: its own settings, as texts.
    logs: a folder for what the workers print.
    hosts: how many processes a unit is, each on a machine of its own.

  Raises:
    UserError: an option that it doesn't have, or its engine isn't there.
  """
  if name == "slurm":
    from vera_jax.sweep.launchers.slurm import Slurm

    return Slurm(options, logs=logs, hosts=hosts)
  if name == "ray":
    from vera_jax.sweep.launchers.ray import Ray

    return Ray(options, logs=logs, hosts=hosts)
  if options:
    raise UserError(
      f"--launcher_options={','.join(options)}: the local launcher has none."
    )
  from vera_jax.sweep.launchers.local import Local

  return Local(logs=logs, hosts=hosts)
