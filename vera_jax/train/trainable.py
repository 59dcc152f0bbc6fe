"""What the training loop asks of the run, or the runs, that it trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Key

from vera_jax.data.packing import Batch
from vera_jax.train.clock import Clock
from vera_jax.train.preemption import Stop
from vera_jax.train.step import State

# of each step, with its number: its microbatches, on the host
Batches = Iterator[tuple[int, tuple[Batch, ...]]]
Refilled = tuple[State, Batches]


class Report(NamedTuple):
  """An epoch, for a person.

  Attributes:
    score: what the progress bar shows from now on.
    lines: what is written above it.
  """

  score: str
  lines: list[str]


@runtime_checkable
class Trainable(Protocol):
  """A `Run` of one model, or an `Ensemble` of several in one program.

  Steps count from 1: `step` is how many updates there have been. In an ensemble
  every array of a state, of the metrics, of `key` and of `rates` has a leading
  axis, one entry per run; and `step` is the program's, from which a run that
  began later has its own.
  """

  @property
  def folder(self) -> Path:
    """Where a trace of the program is written: in the first run's folder."""

  @property
  def steps(self) -> int:
    """The last step, unless patience or a failure ends it earlier."""

  @property
  def size(self) -> int | None:
    """How many runs are on the leading axis; None where there is no axis."""

  @property
  def titles(self) -> Sequence[str]:
    """The name of each run, for the first lines."""

  @property
  def key(self) -> Key[Array, "*runs"]:
    """What dropout's keys are made from, and those of methods that draw."""

  @property
  def rates(self) -> Mapping[str, Array]:
    """The optimiser's numbers, float32 [*runs]."""

  @property
  def first_step(self) -> int:
    """How many updates the last save holds; 0 before the first save."""

  @property
  def lacks_scores(self) -> bool:
    """Whether the evaluation at `first_step` was left because of a signal."""

  @property
  def has_ended(self) -> bool:
    """Whether all epochs are done, or as many as the patience allows."""

  def start(self) -> State:
    """Returns the state at `first_step`: that of the save, or a fresh one."""

  def batches(self, step: int) -> Batches:
    """Returns the microbatches of each step after this one, for ever."""

  def recording(
    self, log: Callable[[str], None], clock: Clock
  ) -> AbstractContextManager:
    """Opens the files of metrics, from `first_step` on.

    Args:
      log: shows a line to a person.
      clock: of the loop, which marks where time goes; saving is for `save`.
    """

  def record(self, step: int, metrics: Mapping[str, Array]) -> float:
    """Waits for the metrics of a step, writes them and returns the loss.

    Raises:
      UserError: one is not a finite number, so that training can't go on.
    """

  def evaluate(self, step: int, state: State, stop: Stop) -> None:
    """Scores the model at the end of an epoch and writes the scores.

    Raises:
      UserError: an output is not a finite number.
      Stopped: a signal came; nothing was written.
    """

  def refill(self, step: int, state: State) -> Refilled | None:
    """Lets runs that wait take the places of those that have ended.

    It is called at the end of an epoch, once that is saved.

    Returns:
      The state and the batches to go on with, by the `key` and the `rates` that
      there are then; None where nothing has changed.
    """

  def save(self, step: int, state: State) -> None:
    """Saves all that training goes on from, on disk when it returns."""

  def report(self) -> Report:
    """Returns what to show a person of the epoch that has just been saved."""
