"""What a run reports in files: metrics.jsonl, TensorBoard, Weights & Biases."""

import errno
import json
import logging
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.files import read_bytes, write_file, write_text
from vera_jax.train.workdir import DAMAGED

log = logging.getLogger(__name__)


class MetricWriter:
  """A run's metrics.jsonl, TensorBoard files and Weights & Biases run.

  Use as a context. The first process writes; in others nothing happens.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    config: Mapping[str, Any],
    step: int = 0,
    primary: bool = True,
    wandb: str = "",
  ) -> None:
    """Open the files; what a resumed run will write again is dropped.

    Lines that are damaged go into the folder `damaged`.

    Args:
      workdir: the run's folder.
      config: shown by Weights & Biases.
      step: the step that the run goes on from; metrics up to it are kept.
      primary: whether this process writes.
      wandb: the project's name; empty: no Weights & Biases.

    Raises:
      UserError: Weights & Biases is asked for but not installed, or the lines
        of before can't be read.
    """
    self._lines: Any = None
    self._board: Any = None
    self._wandb: Any = None
    if not primary:
      return
    if wandb:
      self._wandb = _start_wandb(workdir, config, wandb, resumed=step > 0)
    self._board_folder, self._board_step = workdir / "tensorboard", step + 1
    path, kept, damaged = workdir / results.METRICS, [], []
    for raw, line in results.metric_lines(workdir):
      if line.error:  # no line is needed to go on, and none is thrown away
        damaged.append(raw)
        log.warning("%s:%d can't be read: %s.", path, line.number, line.error)
      elif line.values["step"] <= step:
        kept.append(raw)
    if damaged:
      aside = workdir / DAMAGED / results.METRICS
      aside.parent.mkdir(exist_ok=True)
      with aside.open("ab") as file:
        file.writelines(damaged)
      log.warning("%d such lines were moved to %s.", len(damaged), aside)
    write_file(path, lambda file: file.writelines(kept))
    self._lines = path.open("a", encoding="utf-8", buffering=1)

  def __enter__(self):
    return self

  def __exit__(self, *exc: object) -> None:
    with ExitStack() as stack:  # closes all, even where one of them raises
      if self._wandb is not None:
        stack.callback(self._wandb.finish)
      if self._board is not None:
        stack.callback(_close_tensorboard, self._board)
      if self._lines is not None:
        stack.callback(self._lines.close)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line of metrics.jsonl; the same to TensorBoard and W&B.

    Raises:
      OSError: the files can't be written.
    """
    if self._lines is None:
      return
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    if self._board is None:
      self._board = _tensorboard()(
        str(self._board_folder), purge_step=self._board_step
      )
    # its thread ends at a failed write; then its queue would fill up and block
    thread = getattr(_event_writer(self._board), "_worker", None)
    if thread is not None and not thread.is_alive():
      raise OSError(errno.EIO, "TensorBoard's files can't be written any more")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(dict(values), step=step)


def _tensorboard() -> Any:
  """tensorboardX's writer, imported at the first write and without torch.

  Where torch is installed tensorboardX imports it, to know its arrays: 190 MB
  of memory, and seconds.
  """
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]  # not found then
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hidden:
      del sys.modules["torch"]
  return SummaryWriter


def _start_wandb(
  workdir: Path, config: Mapping[str, Any], project: str, *, resumed: bool
) -> Any:
  """A new run, or for a resumed one that which the file `wandb_id` names."""
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
    id=read_bytes(name, inside=workdir, limit=100).decode("utf-8", "replace"),
    dir=str(workdir),
    config=dict(config),
    resume="allow",
    reinit="create_new",  # the runs of an ensemble are open at the same time
  )


def _event_writer(board: Any) -> Any:
  return getattr(board.file_writer, "event_writer", None)


def _close_tensorboard(board: Any) -> None:
  """Close it; where that fails, keep Python from trying again at its end."""
  writer = _event_writer(board)
  try:
    board.close()
  except OSError:
    if thread := getattr(writer, "_worker", None):
      thread.stop()
      writer._closed = True
    raise
