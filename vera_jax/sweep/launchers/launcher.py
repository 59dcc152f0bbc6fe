"""What a sweep asks of whoever starts its workers, and the choice by name."""

from collections.abc import Callable, Generator, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vera_jax.errors import UserError, install
from vera_jax.sweep.plan import Unit
from vera_jax.train.preemption import Flag


class Task(NamedTuple):
  """A unit, and the message for its worker, in values that JSON has."""

  unit: Unit
  message: dict[str, Any]  # see `worker.main`

  def __str__(self) -> str:
    return ", ".join(run.name for run in self.unit)


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


Outcomes = Generator[Outcome, None, None]
Say = Callable[[str], None]  # shows a line


@runtime_checkable
class Launcher(Protocol):
  """Starts a worker for each unit, where and when it has room.

  Attributes:
    patience: seconds to wait for runs that another process has.
  """

  patience: float

  def run(self, tasks: Iterable[Task], stop: Flag, say: Say) -> Outcomes:
    """Train units; each outcome as it comes.

    Args:
      tasks: what is to be trained, looked up when it can be started.
      stop: set when the user wants to stop.
      say: takes a line that says what was started.

    Raises:
      Interrupted: `stop` was set; the text says what becomes of the units.
      UserError: they can't be started.
    """
    ...


def make_launcher(
  name: str, options: Mapping[str, str], logs: Path
) -> Launcher:
  """The launcher of a name; what it needs is imported only now.

  Args:
    name: one of `NAMES`, which is its module's and, capitalised, its class's.
    options: its own settings, as texts.
    logs: the sweep's folder for what the workers print.

  Raises:
    UserError: an option that it doesn't have, or its engine isn't there.
  """
  try:
    module = import_module(f"vera_jax.sweep.launchers.{name}")
  except ImportError as error:
    raise UserError(
      f"--launcher={name} needs {error.name}: {install(name)}"
    ) from error
  launcher: Launcher = getattr(module, name.capitalize())(options, logs)
  return launcher
