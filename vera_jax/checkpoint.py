"""Save and resume: trainable leaves, optimiser, step and position in the data.

The frozen base and the projections are never in a checkpoint: the base is
loaded from its own files, A and B are made from their seed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  BestN,
  LatestN,
)

from vera_jax.errors import UserError


def _rank(metrics: Mapping[str, float]) -> tuple[float, float]:
  """The higher score is better; of equal ones the earlier epoch."""
  return metrics.get("score", -math.inf), -metrics.get("epoch", math.inf)


class Checkpoints:
  """A run's `checkpoints/` folder: the last two saves and the best epoch.

  The last but one is there for when the last can't be read. A save is small and
  is on disk when `save` returns, so that its errors show where they happen.
  """

  def __init__(self, folder: Path) -> None:
    kept = [LatestN(n=2), BestN(n=1, get_metric_fn=_rank)]
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(kept),
        best_fn=_rank,  # without it the metrics are not written down
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc: object) -> None:
    self._manager.close()

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    progress: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Save at a step.

    Args:
      step: updates done.
      state: a tree of arrays.
      progress: JSON values that a resumed run goes on from.
      metrics: {"score", "epoch"} at the end of an epoch; a save without can't
        be the best one.
    """
    if step == self.latest_step:
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      progress=ocp.args.JsonSave(dict(progress)),
    )
    self._manager.save(step, args=items, metrics=dict(metrics or {}))

  @property
  def resumable(self) -> list[int]:
    """The last save's step and that of the one before it, or 0, the start."""
    return sorted([0, *self._manager.all_steps()])[-2:]

  def forget_after(self, step: int) -> None:
    """Drop the saves beyond a step that the run goes back to."""
    for saved in self._manager.all_steps():
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
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # of whichever layer met the damage
      folder = self._manager.directory / str(step)
      raise UserError(
        f"The save {folder} can't be read. Without that folder the run goes on"
        f" from the save before it. The reason: {error}"
      ) from error
