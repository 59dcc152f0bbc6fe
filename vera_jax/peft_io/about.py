"""What adapter.json says of an imported adapter."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vera_jax import results
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.peft_io.config import PeftSettings
from vera_jax.peft_io.layers import patterns
from vera_jax.peft_io.origin import Origin
from vera_jax.tasks.glue import glue_task

RUN = ("task", "seed", "labels", "score_name", "score", "versions")


def describe(
  carried: Mapping[str, Any], *, task: str | None, num_labels: int, base: Path
) -> dict[str, Any]:
  """The words about the run: from `--task`, from our own export, or none."""
  words: dict[str, Any] = dict.fromkeys(RUN)
  words["versions"] = results.provenance()["versions"]
  words |= {name: carried[name] for name in RUN if name in carried}
  if task is not None:
    named = glue_task(task)
    words |= {"task": task, "labels": list(named.labels)}
    words |= {"score_name": named.metrics[0]}
  if not isinstance(words["labels"], list):
    words["labels"] = _base_labels(base, num_labels)
  if (len(words["labels"]) or 1) != num_labels:
    raise UserError(
      f"The head has {num_labels} outputs, but the labels are"
      f" {', '.join(map(str, words['labels']))}."
    )
  return words


def _base_labels(base: Path, num_labels: int) -> list[str]:
  if num_labels == 1:
    return []
  names = read_json(base / "config.json").get("id2label") or {}
  if len(names) == num_labels:
    return [str(name) for name in names.values()]
  return [f"LABEL_{i}" for i in range(num_labels)]


def our_settings(
  settings: PeftSettings,
  origin: Origin | None,
  *,
  kinds: Collection[TreePath],
  there: Collection[TreePath],
  ours: Mapping[str, Any],
) -> dict[str, Any]:
  """The method's settings as a run's config names them; no rate is known."""
  common = {
    "rank": settings.rank,
    "targets": patterns(kinds, there),
    "lr": ours.get("lr"),
    "head_lr": ours.get("head_lr"),
  }
  if origin is None:
    return {**common, "alpha": settings.alpha}
  return {
    **common,
    "d_init": settings.d_init,
    "init": origin.init,
    "projection_seed": origin.seed,
    "sharing": "shared",
    "train": "both",
  }
