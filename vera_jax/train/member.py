"""One run of a group: its folder, figures and fate; a run alone is one too."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.files import save_adapter, tensors
from vera_jax.adapters.norms import adapter_norms, as_json
from vera_jax.adapters.projections import PRNG
from vera_jax.models.hf_weights import fingerprint
from vera_jax.train.checkpoint import Checkpoints
from vera_jax.train.distributed import is_first, on_first
from vera_jax.train.group import own_settings
from vera_jax.train.logging import MetricWriter
from vera_jax.train.run import Run, about, learning_rates
from vera_jax.train.step import State

log = logging.getLogger(__name__)

SUBMISSION = "submission"


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The epoch of the highest score; of equal ones the first."""
  return max(history, key=lambda epoch: (epoch["score"], -epoch["epoch"]))


class Member:
  """One run: its folder, its figures and its fate.

  Attributes:
    progress: JSON values that a resumed run goes on from. `crew` has the own
      settings of every slot of the program that trained it, `members` their
      number in its last epoch.
    result, failure: what its result.json or failed.json says, if it is there.
    held: whether this process has the folder to itself.
    saves, figures: open while the run trains.
  """

  saves: Checkpoints
  figures: MetricWriter

  def __init__(self, config: ConfigDict, folder: Path, *, title: str) -> None:
    self.config, self.folder, self.title = config, folder, title
    self.own = own_settings(config)
    self.held = False
    self.progress: dict[str, Any] = {
      "history": [],
      "loss_sum": 0.0,
      "seconds": 0.0,
      "members": 1,
      "crew": [self.own],
    }
    self.result = results.read(folder)
    self.failure = results.read(folder, results.FAILED)

  def resume(self, saves: Checkpoints) -> None:
    """Take the last save's progress, if there is one.

    Where the best epoch's save is lost, that of the last save before which it
    is there, or of none: the best epoch is trained again.
    """
    self.saves = saves
    for step in reversed(saves.steps):
      progress = saves.progress(step)
      history = progress["history"]
      if not history or best_epoch(history)["step"] in saves.steps:
        self.progress |= progress
        break
      log.warning(
        "%s: step %d is not gone on from, since the save of the best epoch,"
        " step %d, is not there.",
        *(self.folder, step, best_epoch(history)["step"]),
      )
      saves.forget_after(step - 1)

  def go_back_to(self, step: int, shape: Any) -> State:
    """A save's state; its progress is the member's, later saves are dropped."""
    self.saves.forget_after(step)
    state, progress = self.saves.restore(step, shape)
    self.progress |= progress
    return state

  @property
  def wants_test(self) -> bool:
    return self.config.predict_test and not (self.folder / SUBMISSION).exists()

  @property
  def outcome(self) -> dict[str, Any]:
    """The contents of result.json, or else of failed.json."""
    outcome = self.result or self.failure
    assert outcome is not None  # asked for when all is done
    return outcome

  @property
  def open(self) -> bool:
    """Whether anything is left to do."""
    if self.result is not None:
      return self.wants_test
    return self.failure is None

  @property
  def ended(self) -> bool:
    """Whether it has trained all its epochs, or those its patience allows."""
    history, optim = self.progress["history"], self.config.optim
    if len(history) == optim.epochs:
      return True
    if not history or optim.patience is None:
      return False
    waited = len(history) - best_epoch(history)["epoch"]
    return waited >= optim.patience

  def fail(self, reason: str, *, step: int) -> None:
    """Note, not yet in the folder, that no training can go on from here."""
    self.failure = {
      "task": self.config.task,
      "method": self.config.method,
      "seed": self.config.seed,
      "step": step,
      "failed": reason,
      "config": self.config.to_dict(),
    }

  def forget_failure(self) -> None:
    """A run that is tried again has not failed."""
    if is_first():
      (self.folder / results.FAILED).unlink(missing_ok=True)

  def write_failure(self) -> None:
    if self.failure is not None and is_first():
      self.failure = results.write(self.folder, self.failure, results.FAILED)

  def finish(self, run: Run, params: Any) -> None:
    """The first process writes adapter and result; then all have the result."""
    on_first(partial(self._write, run, params))
    self.result = results.read(self.folder)

  def _write(self, run: Run, params: Any) -> None:
    """The adapter and then, since it marks a run as done, the result."""
    history, config = self.progress["history"], self.config
    best = best_epoch(history)
    facts = about(run, config)
    result = {
      **facts,
      "best": best,
      "last": history[-1],
      "stopped_early": len(history) < config.optim.epochs,
      "parameters": run.model.counts._asdict(),
      "learning_rates": learning_rates(config),
      "norms": as_json(adapter_norms(tensors(params))),
      "history": history,
      "seconds": self.progress["seconds"],
      "members": self.progress["members"],
      "data": {
        name: {
          "examples": len(split),
          "truncated": split.truncated,
          "fingerprint": split.fingerprint,
        }
        for name, split in run.data.tokens.items()
      },
      "config": config.to_dict(),
      **results.provenance(),
    }
    save_adapter(
      self.folder / "adapter",
      params,
      about={
        **facts,
        "score": best["score"],
        "settings": config[config.method].to_dict(),
        "projection_prng": PRNG,
        "base_fingerprint": fingerprint(run.base),
        "max_length": config.data.max_length,
        "parameters": result["parameters"],
        "versions": result["versions"],
      },
    )
    results.write(self.folder, result)


def cohorts(
  members: Sequence[Member],
) -> Iterator[tuple[int, list[Member], list[Member]]]:
  """Yields (step, those that train from there, the crew of their program).

  Members that can stand at the same step train together. To meet others a
  member goes back by one save and no further: so far apart are those of a group
  that was killed between two members' saves. One that stands elsewhere, since
  it was trained alone, is trained alone again.
  """
  left = [m for m in members if m.result is None and m.open and not m.ended]
  while left:
    step = min(m.saves.resumable[-1] for m in left)
    live = [m for m in left if step in m.saves.resumable]
    yield step, live, _crew(step, live, members)
    left = [m for m in left if m not in live]


def _crew(
  step: int, live: list[Member], members: Sequence[Member]
) -> list[Member]:
  """The slots as they were saved, idle ones too: the same program again.

  In another group than that which was saved, those that train and no others.
  """
  if step == 0:
    return live
  slots, *others = [m.saves.progress(step).get("crew") for m in live]
  crew = [m for own in slots or [] for m in members if m.own == own]
  whole = len(crew) == len(slots or [])
  return crew if whole and all(o == slots for o in others) and crew else live
