"""The texts of E2E alone, to be written character by character or otherwise.

What people wrote about restaurants, without the facts: for networks that are
given no prompt. The score that compares all of them, whatever they split texts
into, is bits per character: what the learned tokens take on average, the end of
a text being one more character.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vera_jax.data.completions import Completions
from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.examples import Examples
from vera_jax.errors import UserError
from vera_jax.tasks.e2e import training_data
from vera_jax.tasks.e2e_files import Pairs
from vera_jax.tasks.language_modelling import language_modelling
from vera_jax.tasks.task import Evaluation, Presentation, Size, Task

NAMES = ("e2e_texts",)
BITS = "bits_per_character"
CHARACTERS = 113  # mean of a training text, its end included


def task_for(config: ConfigDict) -> Task | None:
  """E2E's texts; None where config.task has another name.

  Raises:
    UserError: the data can't be read; the message names file and line.
  """
  if config.task not in NAMES:
    return None
  train, valid, where = training_data(config)
  data, splits = config.data, {"train": train, "valid": valid}
  task = language_modelling(
    "e2e_texts",
    read_split=lambda source, split: _examples(splits[split]),
    dev_splits=("valid",),
    completions=Completions("right"),
    smoothing=config.optim.label_smoothing,
    presentation=Presentation(
      title="E2E's texts",
      size=Size(len(train.texts), len(valid.texts), CHARACTERS),
      notes=(f"valid: {len(valid.texts)} texts of {where}",),
    ),
  )
  characters = sum(len(text) + 1 for text in valid.texts)

  def load(config: ConfigDict, folder: Path, **sharding: Any) -> TaskData:
    """Tokenised; no scored text may be cut, for all its characters count."""
    loaded = task.load(config, folder, **sharding)
    if cut := loaded.record()["valid"]["truncated"]:
      raise UserError(
        f"{cut} of the scored texts are cut at config.data.max_length="
        f"{data.max_length}, so that the bits per character would be of a part:"
        " set it higher."
      )
    return loaded

  def evaluate(measure_batch: MeasureBatch, data: TaskData) -> Evaluation:
    """As the loss says, and in bits of each character."""
    evaluation = task.evaluate(measure_batch, data)
    if not evaluation.finite:
      return evaluation
    scores = evaluation.scores
    nats = scores["loss"] * data.record()["valid"]["learned"]
    bits = nats / math.log(2) / characters
    return evaluation._replace(scores={**scores, BITS: bits})

  return task._replace(
    load=load,
    evaluate=evaluate,
    selects=False,
  )


def _examples(rows: Pairs) -> Examples:
  return Examples(
    first=rows.texts, second=None, labels=None, index=np.arange(len(rows.texts))
  )
