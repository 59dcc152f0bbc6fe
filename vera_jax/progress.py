"""The progress of long work, for a person: a bar and lines above it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from vera_jax.terminal import Console, printable


def show_stage(text: str) -> None:
  """What is done now, for whoever waits at a terminal; nothing elsewhere."""
  console = Console(stderr=True)
  if console.is_terminal:
    console.print(f"{text} ...")


@contextmanager
def bytes_bar(
  total: int, *, doing: str, primary: bool = True
) -> Iterator[Callable[[int], None]]:
  """A bar in bytes, in a terminal; nothing elsewhere.

  Yields:
    A function that moves the bar on by so many bytes.
  """
  console = Console(stderr=True, quiet=not primary)
  with Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    DownloadColumn(),
    TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
  ) as progress:
    yield partial(progress.advance, progress.add_task(doing, total=total))


class ProgressBar:
  """A bar with the time left, in a terminal, and log lines anywhere.

  Use as a context. Only the first process shows anything.
  """

  def __init__(
    self,
    *,
    steps: int,
    step: int = 0,
    primary: bool = True,
    doing: str = "training",
  ) -> None:
    self.console = Console(stderr=True, quiet=not primary)
    self._progress = Progress(
      TextColumn("{task.description}", markup=False),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[note]}", markup=False),
      TimeRemainingColumn(),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    # before the first step of a training stands what takes so long
    note = "compiling" if doing == "training" else ""
    self._task = self._progress.add_task(
      printable(doing), total=steps, completed=step, note=note
    )
    self._score = ""

  def __enter__(self):
    self._progress.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._progress.stop()

  def log(self, text: str) -> None:
    """A line above the bar."""
    self.console.print(text, soft_wrap=True)

  def advance(self, step: int, *, loss: float | None = None) -> None:
    """Move the bar to a step."""
    note = "" if loss is None else f"loss {loss:.4f} {self._score}"
    self._progress.update(self._task, completed=step, note=note)

  def show_score(self, text: str, *, steps: int) -> None:
    """What stands behind the loss from the next step on, of so many steps."""
    self._score = text
    self._progress.update(self._task, total=steps)
