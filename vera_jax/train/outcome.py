"""What a run leaves behind when it has ended: answers, adapter, texts, result.

Every process of a run calls these functions; the first one writes.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vera_jax import results
from vera_jax.adapters.files import save_adapter, tensors
from vera_jax.adapters.methods import settings_in
from vera_jax.adapters.projections import PRNG
from vera_jax.adapters.stored_pair import in_file, is_stored
from vera_jax.adapters.vector_norms import adapter_norms, as_json
from vera_jax.errors import UserError
from vera_jax.files import make_folder
from vera_jax.pretrained.classifier import Classifier
from vera_jax.train.clock import with_result
from vera_jax.train.distributed import on_first
from vera_jax.train.optim import learning_rates
from vera_jax.train.setup import Setup
from vera_jax.train.step import Tree
from vera_jax.train.workdir import require_lock

NO_MEMORY = "RESOURCE_EXHAUSTED"  # how XLA's message begins
SUBMISSION = "submission"  # the folder of the answers to the test splits


def write_answers(folder: Path, setup: Setup, params: Tree) -> None:
  """Write the answers to the test splits, if the task has such files."""
  if setup.task.write_answers is None:
    return
  measure_batch = setup.measure_with(params)
  write = setup.task.write_answers(measure_batch, setup.data)

  def write_all() -> None:
    require_lock(folder)
    make_folder(folder / SUBMISSION, write)  # all files or none

  on_first(write_all)


def write_outcome(
  folder: Path,
  setup: Setup,
  config: ConfigDict,
  params: Tree,
  best: dict[str, Any],
  progress: dict[str, Any],
  began: float,
) -> dict[str, Any]:
  """Write the adapter, the texts and, since it marks a run as done, the result.

  Args:
    folder: the run's.
    setup: what it trained.
    config: the run's own, which may be another than `setup`'s in an ensemble.
    params: the trained leaves, whole on every device.
    best: the epoch that they are of.
    progress: as `Run.progress`.
    began: when all this began, on `time.monotonic`'s clock.

  Returns:
    The contents of result.json.
  """
  task, history = setup.task, progress["history"]
  about = {
    "task": task.name,
    "method": config.method,
    "seed": config.seed,
    "base": config.model.name,
    "labels": list(task.labels),
    "kind": task.kind,
    **task.stored,
    "score_name": task.score_name,
    "projection_digest": setup.model.digest,
    "parameters": setup.model.counts._asdict(),
    "data": setup.data.record(),
  }
  adapter = {
    **about,
    "score": best["score"],
    "settings": in_file(settings_in(config, config.method)),
    "projection_prng": PRNG,
    "base_fingerprint": setup.fingerprint.result(),
    "quantise": setup.model.blueprint.quantise,
    "codes_digest": setup.model.codes,
    "max_length": config.data.max_length,
    "versions": results.provenance()["versions"],
  }
  on_first(partial(require_lock, folder))
  # before the texts, whose failure must not cost what was trained
  saved = params
  if is_stored(adapter):
    saved = {**params, "projections": setup.frozen.projections}
  on_first(partial(save_adapter, folder / "adapter", saved, about=adapter))
  # by all processes, since each may hold a part of the base
  trained = setup.trained(params) if task.write_texts else None

  general: dict[str, Any] = {}
  if task.general_loss is not None:
    before = progress["general_loss"]
    after = task.general_loss(setup.measure_with(params), setup.data)
    general = {"before": before, "after": after, "forgetting": after - before}
    if not math.isfinite(after - before):
      general = {"missing": f"The loss was {before} and is {after}."}

  def write_result() -> None:
    result = {
      **about,
      "best": best,
      "last": history[-1],
      **({} if trained is None else {"test": _texts(setup, trained, folder)}),
      **({"general": general} if general else {}),
      "stopped_early": history[-1]["epoch"] < config.optim.epochs,
      "learning_rates": learning_rates(config, setup.extent),
      "norms": as_json(adapter_norms(tensors(params))),
      "history": history,
      "seconds": progress["seconds"],
      "evaluation_seconds": progress["evaluation_seconds"],
      "speed": with_result(progress["speed"], time.monotonic() - began),
      "members": len(progress.get("ensemble", {"slots": [0]})["slots"]),
      "config": config.to_dict(),
      **results.provenance(),
    }
    require_lock(folder)
    results.write(folder, result)

  on_first(write_result)
  result = results.read(folder)
  assert result is not None
  return result


def _texts(setup: Setup, trained: Classifier, folder: Path) -> dict[str, Any]:
  """The task's texts and scores; where there are none, the reason.

  The same command would fail here again, so the result comes without them.
  """
  assert setup.task.write_texts is not None
  try:
    return setup.task.write_texts(trained, folder)
  except (UserError, jax.errors.JaxRuntimeError) as error:
    if not isinstance(error, UserError) and NO_MEMORY not in str(error):
      raise
    missing = f"The run's texts were not written or not scored: {error}"
    return {"inputs": 0, "scores": {}, "missing": missing, "seconds": 0.0}
