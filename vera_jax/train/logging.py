"""What a run reports in files: metrics.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl has a step's numbers by their names; TensorBoard and Weights &
Biases, which sort them into panels, as train/loss, eval/accuracy and
speed/tokens_per_second, with the step's learning rates.
"""

import errno
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flax.traverse_util import flatten_dict

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.files import DATA, read_bytes, write_file, write_text
from vera_jax.imports import without
from vera_jax.places import Mirror, is_remote
from vera_jax.train.workdir import DAMAGED, require_lock

if TYPE_CHECKING:
  from tensorboardX import SummaryWriter

log = logging.getLogger(__name__)
EPOCH = "epoch"  # which an evaluation's line has, and a step's has not


class Writer(Protocol):
  """A place that metrics are written to, with steps in rising order."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Write the metrics of a step by name, which need not be the same ones.

    Raises:
      OSError: they can't be written.
    """

  def close(self) -> None:
    """Finish what is being written; nothing is written afterwards."""


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
    scored: bool = True,
    primary: bool = True,
    wandb: str = "",
    rates: Callable[[int], Mapping[str, float]] = lambda step: {},
  ) -> None:
    """Open the files; what a resumed run will write again is dropped.

    Args:
      workdir: the run's folder.
      config: shown by TensorBoard and Weights & Biases.
      step: the step that the run goes on from; metrics up to it are kept.
      scored: whether the scores of that step are, or it is evaluated again.
      primary: whether this process writes.
      wandb: the project's name; empty: no Weights & Biases.
      rates: the learning rates of a step.

    Raises:
      UserError: Weights & Biases is asked for but not installed, or the lines
        of before can't be read.
    """
    self._writers: list[Writer] = []
    self._lines: Writer | None = None
    self._rates = rates
    self._mirror: Mirror | None = None
    if not primary:
      return
    if is_remote(workdir):  # a later owner's lines are not written over
      self._mirror = Mirror(workdir, partial(require_lock, workdir))
    files = self._mirror.local if self._mirror else workdir
    if wandb:
      resumed = step > 0
      online = WeightsAndBiases(
        workdir, config, wandb, resumed=resumed, files=files
      )
      self._writers.append(online)
    board = TensorBoard(files / "tensorboard", first=step + 1, config=config)
    self._lines = JsonLines(workdir, last=step, scored=scored, files=files)
    self._writers = [self._lines, board, *self._writers]

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc: object) -> None:
    with ExitStack() as stack:  # closes all, even where one of them raises
      if self._mirror:
        stack.callback(self._mirror.close)
      for writer in reversed(self._writers):
        stack.callback(writer.close)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Write a step's metrics everywhere.

    Raises:
      OSError: the files can't be written.
    """
    if not self._writers:
      return
    scores = EPOCH in values
    rates = {} if scores else self._rates(step)
    group = "eval" if scores else "train"
    shown = {
      name if "/" in name else f"{group}/{name}": value
      for name, value in {**values, **rates}.items()
    }
    for writer in self._writers:
      writer.write(step, values if writer is self._lines else shown)

  def flush(self) -> None:
    """Return once the lines of all steps are where the run's folder is.

    Local ones are as soon as they are written.
    """
    if self._mirror:
      self._mirror.copy()


class JsonLines:
  """metrics.jsonl: one JSON object per line, on disk as soon as written."""

  def __init__(
    self,
    workdir: Path,
    *,
    last: int,
    scored: bool = True,
    files: Path | None = None,
  ) -> None:
    """Keep the lines up to a step.

    Lines that are damaged go into the folder `damaged`.

    Args:
      workdir: the run's folder.
      last: the step.
      files: the folder that is written into; None for the run's.
    """
    path, kept, damaged = workdir / results.METRICS, [], []
    for raw, line in results.metric_lines(workdir):
      if line.error:  # no line is needed to go on, and none is thrown away
        damaged.append(raw)
        log.warning("%s:%d can't be read: %s.", path, line.number, line.error)
      elif (line.values["step"], EPOCH in line.values) <= (last, scored):
        kept.append(raw)
    if damaged:
      aside = workdir / DAMAGED / results.METRICS
      aside.parent.mkdir(exist_ok=True)
      before = b""
      if aside.exists():
        before = read_bytes(aside, inside=aside.parent, limit=DATA)
      write_file(aside, lambda file: file.writelines([before, *damaged]))
      log.warning("%d such lines were moved to %s.", len(damaged), aside)
    path = (files or workdir) / results.METRICS
    write_file(path, lambda file: file.writelines(kept))
    self._file = path.open("a", encoding="utf-8", buffering=1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(json.dumps({"step": step, **values}) + "\n")

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """TensorBoard's files, begun at the first write."""

  def __init__(
    self, folder: Path, *, first: int, config: Mapping[str, Any]
  ) -> None:
    """TensorBoard forgets what it has of the step `first` and later ones.

    The config is in its tab of hyperparameters.
    """
    self._folder, self._first, self._config = folder, first, config
    self._board: SummaryWriter | None = None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self._board is None:
      writer = _summary_writer()
      self._board = writer(str(self._folder), purge_step=self._first)
      self._write_config(self._board)
    # its thread ends at a failed write; then its queue would fill up and block
    thread = getattr(_event_writer(self._board), "_worker", None)
    if thread is not None and not thread.is_alive():
      raise OSError(errno.EIO, "TensorBoard's files can't be written any more")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def _write_config(self, board: "SummaryWriter") -> None:
    from tensorboardX.summary import hparams

    flat = flatten_dict(dict(self._config), sep=".")
    settings = {
      name: value if isinstance(value, bool | int | float) else str(value)
      for name, value in flat.items()
    }
    names, values, _ = hparams(settings, {"train/loss": 0.0})
    for part in (names, values):
      board.file_writer.add_summary(part)

  def close(self) -> None:
    """Where it fails, Python is kept from trying again at its end."""
    if self._board is None:
      return
    writer = _event_writer(self._board)
    try:
      self._board.close()
    except OSError:
      if thread := getattr(writer, "_worker", None):
        thread.stop()
        writer._closed = True
      raise


def _summary_writer() -> "type[SummaryWriter]":
  """tensorboardX's writer, imported without torch and clients of stores.

  Its files are local here, and torch it imports to know its arrays.
  """
  with without("torch", "boto3", "google.cloud.storage"):
    from tensorboardX import SummaryWriter
  return SummaryWriter


def _event_writer(board: "SummaryWriter") -> Any:
  return getattr(board.file_writer, "event_writer", None)


class WeightsAndBiases:
  """A run of Weights & Biases, which the file `wandb_id` names when resumed."""

  def __init__(
    self,
    workdir: Path,
    config: Mapping[str, Any],
    project: str,
    *,
    resumed: bool,
    files: Path | None = None,
  ) -> None:
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
    self._run = wandb.init(
      project=project,
      id=read_bytes(name, inside=workdir, limit=100).decode("utf-8", "replace"),
      dir=str(files or workdir),
      config=dict(config),
      resume="allow",
      reinit="create_new",  # the runs of an ensemble are open at the same time
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()
