"""What a run tells while it runs: log lines, progress bar, metric files."""

import errno
import json
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from vera_jax.errors import UserError
from vera_jax.train.workdir import write_text


def _read_until(path: Path, step: int) -> list[str]:
  """The lines of metrics.jsonl up to a step: those of a resumed run."""
  if not path.exists():
    return []
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except ValueError:  # cut off when the run was killed
      continue
  return kept


def _wandb_run(
  workdir: Path, config: Mapping[str, Any], project: str, *, resumed: bool
) -> Any:
  """A run of its own, or when resumed the one that `wandb_id` names."""
  try:
    import wandb
  except ImportError as error:
    raise UserError(
      f"config.log.wandb={project!r} asks for Weights & Biases, which is not"
      " installed: pip install wandb, or leave the setting empty."
    ) from error
  name = workdir / "wandb_id"
  if not (resumed and name.exists()):
    write_text(name, uuid.uuid4().hex)
  return wandb.init(
    project=project,
    id=name.read_text(encoding="utf-8"),
    dir=str(workdir),
    config=dict(config),
    resume="allow",
    reinit="create_new",  # a group's members are open at the same time
  )


def _tensorboard(folder: str, *, purge_step: int) -> Any:
  from tensorboardX import SummaryWriter  # imports torch where there is one

  return SummaryWriter(folder, purge_step=purge_step)


def _check_board(board: Any) -> None:
  """Its thread ends at a failed write, and the queue to it then fills up."""
  writer = getattr(board.file_writer, "event_writer", None)
  thread = getattr(writer, "_worker", None)
  if thread is not None and not thread.is_alive():
    raise OSError(errno.EIO, "TensorBoard's files can't be written any more")


def _close_board(board: Any) -> None:
  """On a full disk once, not again as Python ends."""
  writer: Any = getattr(board.file_writer, "event_writer", None)
  try:
    board.close()
  except OSError:
    if thread := getattr(writer, "_worker", None):
      thread.stop()
      writer._closed = True
    raise


class Figures:
  """A run's metric files. The primary process writes. Use as a context."""

  def __init__(
    self,
    workdir: Path,
    *,
    config: Mapping[str, Any],
    step: int = 0,
    primary: bool = True,
    wandb: str = "",
  ) -> None:
    self._wandb = (
      _wandb_run(workdir, config, wandb, resumed=step > 0)
      if wandb and primary
      else None
    )
    self._lines: Any = None
    self._board: Any = None
    if primary:
      self._open(workdir, step)

  def _open(self, workdir: Path, step: int) -> None:
    path = workdir / "metrics.jsonl"
    kept = _read_until(path, step)
    write_text(path, "".join(line + "\n" for line in kept))
    self._lines = path.open("a", encoding="utf-8", buffering=1)
    self._open_board = partial(
      _tensorboard, str(workdir / "tensorboard"), purge_step=step + 1
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    with ExitStack() as stack:
      if self._wandb is not None:
        stack.callback(self._wandb.finish)
      if self._board is not None:
        stack.callback(_close_board, self._board)
      if self._lines is not None:
        stack.callback(self._lines.close)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line of metrics.jsonl; the same to TensorBoard and W&B."""
    if self._lines is None:
      return
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    if self._board is None:
      self._board = self._open_board()
    _check_board(self._board)
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(dict(values), step=step)


class Reporter(Figures):
  """The figures of a run, and what it, or its whole group, tells a person."""

  def __init__(
    self,
    workdir: Path,
    *,
    config: Mapping[str, Any],
    steps: int,
    step: int = 0,
    primary: bool = True,
    wandb: str = "",
  ) -> None:
    self.console = Console(stderr=True, quiet=not primary, highlight=False)
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[note]}"),
      TimeRemainingColumn(),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._task = self._progress.add_task(
      "training", total=steps, completed=step, note=""
    )
    self._score = ""
    super().__init__(
      workdir, config=config, step=step, primary=primary, wandb=wandb
    )

  def __enter__(self) -> Self:
    self._progress.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._progress.stop()
    super().__exit__(*exc)

  def log(self, text: str) -> None:
    self.console.print(text, markup=False, soft_wrap=True)

  def advance(self, step: int, *, loss: float) -> None:
    """Move the bar to a step."""
    note = f"loss {loss:.4f} {self._score}"
    self._progress.update(self._task, completed=step, note=note)

  def show_score(self, text: str) -> None:
    self._score = text
