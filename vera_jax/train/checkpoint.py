"""Save and resume: trainable leaves, optimiser, step and position in the data.

The frozen base and the projections are never in a checkpoint: the base is
loaded from its own files, A and B are made from their seed.

Several processes save and restore together, in one folder that all of them see.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  LatestN,
)

from vera_jax.errors import UserError
from vera_jax.places import is_remote, move_folder, place
from vera_jax.train.distributed import on_first
from vera_jax.train.manifest import find_damage, read_manifest, write_manifest
from vera_jax.train.step import Tree
from vera_jax.train.workdir import (
  DAMAGED,
  DiskFull,
  changed_settings,
  identity,
  is_disk_full,
)

log = logging.getLogger(__name__)

# Bytes for a leaf's description and files; a save has some files of its own.
ROOM = 8192
# In a store, which can't rename a folder, orbax marks whole saves by a file.
COMMITTED = "commit_success.txt"


def _is_news(record: logging.LogRecord) -> bool:
  """Whether orbax tells what it will not raise as well, where `save` waits."""
  return "_SignalingThread" not in str(record.msg)


class _BestStep:
  """A preservation policy of orbax, which keeps one step."""

  step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
    return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
  """A run's `checkpoints/` folder: the last two saves and the best epoch.

  The last but one is there in case the last is damaged. A save is small and is
  on disk when `save` returns, so that its errors show where they happen.
  """

  def __init__(
    self, folder: Path, config: Mapping[str, Any] | None = None
  ) -> None:
    """Open the folder; damaged saves are set aside first, and named.

    Args:
      folder: made when missing.
      config: the run's. Its saves carry it, and those of another are refused.
    """
    self._folder = place(folder)
    self._config = None if config is None else identity(config)
    logging.getLogger("absl").addFilter(_is_news)
    on_first(self._check_saves)
    self._best = _BestStep()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(n=2), self._best]),
        # saves that were cut off: until it is whole, orbax gives a save
        # another name; damage after that only the manifest notices
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc: object) -> None:
    self._manager.close()

  def _check_saves(self) -> None:
    """Set damaged saves aside; refuse those of another config."""
    # not the temporary names that orbax gives to saves which are cut off
    for save in sorted(self._folder.glob("[0-9]*")):
      if not save.name.isdigit():
        continue
      if is_remote(save) and not (save / COMMITTED).exists():
        continue  # cut off; orbax clears it away
      if reason := find_damage(save):
        aside = self._folder.with_name(DAMAGED)
        names = (save.name, *(f"{save.name}-{i}" for i in range(2, 10_000)))
        kept = next(aside / n for n in names if not (aside / n).exists())
        move_folder(save, kept)
        log.warning(
          "The save of step %s is not used: %s. It is kept as %s, and the"
          " newest whole save is used.",
          *(save.name, reason, kept),
        )
        continue
      saved = read_manifest(save).get("config")
      if self._config is None or saved is None:
        continue
      if differ := changed_settings(saved, self._config):
        raise UserError(
          f"{save} is the save of a run of another config. Choose another"
          " --workdir, or the same settings. Different are:\n  "
          + "\n  ".join(differ)
        )

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """All that are saved, ascending."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: Tree,
    progress: Mapping[str, Any],
    *,
    best: int | None = None,
  ) -> None:
    """Save at a step; a save that fails leaves the others as they are.

    Args:
      step: updates done.
      state: a tree of arrays.
      progress: JSON values that a resumed run goes on from.
      best: the step of the best epoch so far, whose save is kept.

    Raises:
      DiskFull: step and last good save are named.
    """
    last, self._best.step = self.latest_step, best
    if step == (last or 0):  # nothing was trained since
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      progress=ocp.args.JsonSave(dict(progress)),
    )
    fields = {"step": step, "config": self._config}
    leaves = jax.tree.leaves(state)
    need = sum(leaf.nbytes for leaf in leaves) + ROOM * (32 + len(leaves))

    def check_room() -> None:
      # Orbax writes many files in many threads: on a full disk each of them
      # prints a traceback, some of them from C++. A store has room.
      if (
        not is_remote(self._folder)
        and shutil.disk_usage(self._folder).free < need
      ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
      on_first(check_room)
      with not_anew(self._folder), without_metrics():
        self._manager.save(step, args=items)
      on_first(lambda: write_manifest(self._folder / str(step), fields))
    except Exception as error:  # of whichever layer met the full disk
      if not is_disk_full(error, self._folder):
        raise
      raise DiskFull(
        f"The disk is full: step {step} could not be saved in {self._folder}."
        f" {good_save(last)} Free some space; the same command goes on from"
        " there."
      ) from error

  @property
  def resumable(self) -> list[int]:
    """The last save's step and that of the one before it, or 0, the start."""
    return [0, *self.steps][-2:]

  def forget_after(self, step: int) -> None:
    """Drop the saves beyond a step that the run goes back to."""
    for saved in self.steps:
      if saved > step:
        self._manager.delete(saved)

  def progress(self, step: int) -> dict[str, Any]:
    """The progress of a step alone."""
    return self._read(step, progress=ocp.args.JsonRestore()).progress

  def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    """(state, progress) of a step.

    Args:
      step: a step that was saved.
      state: arrays, or their shapes, that say the shardings to restore to.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = self._read(
      step,
      state=ocp.args.StandardRestore(abstract),
      progress=ocp.args.JsonRestore(),
    )
    return restored.state, restored.progress

  def _read(self, step: int, **items: Any) -> Any:
    folder = self._folder / str(step)
    reason: object = find_damage(folder)
    try:
      if reason is None:
        return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # of whichever layer met the damage
      reason = error
    raise UserError(
      f"The save of step {step} can't be read: {reason}. The same command sets"
      f" it aside and goes on from the save before it, or without {folder}."
    )


@contextmanager
def not_anew(folder: Path) -> Iterator[None]:
  """Holds that a local folder which is removed meanwhile stays removed.

  Orbax would make it anew for a save, and the next start would take that for a
  run whose config is missing.

  Raises:
    FileNotFoundError: it was removed; a new one in its place is removed, too.
  """
  if is_remote(folder):  # a store has no folders
    yield
    return
  held = os.open(folder, os.O_RDONLY)  # no other folder can get its inode
  try:
    yield
    if not os.path.samestat(os.fstat(held), folder.stat()):
      # each process does this, where there are several
      shutil.rmtree(folder, ignore_errors=True)
      raise FileNotFoundError(
        errno.ENOENT, os.strerror(errno.ENOENT), str(folder)
      )
  finally:
    os.close(held)


@contextmanager
def without_metrics() -> Iterator[None]:
  """Keeps orbax from collecting tensorstore's metrics.

  It would log from them how much was written. At each save the answer takes
  18 kB that tensorstore never frees.
  """
  name = "experimental_collect_matching_metrics"
  collect = getattr(tensorstore, name, None)
  if collect is None:  # a later version need not have it
    yield
    return
  setattr(tensorstore, name, lambda *_, **__: [])
  try:
    yield
  finally:
    setattr(tensorstore, name, collect)


def good_save(step: int | None) -> str:
  """A sentence: what is left when a run stops on an error."""
  if step is None:
    return "No checkpoint was saved yet."
  return f"The last good checkpoint is that of step {step}."
