"""Whole texts, or images: classes, several labels or a number, and choices.

Each example has one row of logits. A text that is classified has them from the
head's outputs. An example that asks between choices is one text per choice,
which the head scores with a single output; the scores of an example's texts are
its logits, so that loss, metrics and answers are those of classification.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Float32, Num
from ml_collections import ConfigDict

from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.examples import Examples
from vera_jax.data.layout import choose_eval_layout, choose_layout, limit_rows
from vera_jax.data.loader import PackedData
from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.data.tokens import load_tokens
from vera_jax.models.kinds import CLASSES, NUMBER, SEVERAL
from vera_jax.tasks.metrics import collapsed, confusion, score
from vera_jax.tasks.task import (
  UNTITLED,
  Evaluation,
  Load,
  Presentation,
  Task,
  ToTexts,
  evaluate_splits,
)

Logits = Float32[np.ndarray, "examples labels"]
MOST = 20  # classes that a confusion table has
# The mean probability of the right answer, the geometric mean: of the loss L
# it is exp(-L), so that the highest one is the lowest loss.
PROBABILITY = "label_probability"
# (folder, split, predictions, the examples' numbers in its source) -> its file
WriteAnswers = Callable[[Path, str, np.ndarray, np.ndarray], Path]


def classification(
  name: str,
  *,
  labels: tuple[str, ...],
  metrics: tuple[str, ...],
  read_split: Callable[[str, str], Examples] | None = None,
  load: Load | None = None,
  dev_splits: tuple[str, ...],
  test_splits: tuple[str, ...] = (),
  write_answers: WriteAnswers | None = None,
  to_texts: ToTexts | None = None,
  presentation: Presentation = UNTITLED,
  kind: str | None = None,
  class_weights: Float32[np.ndarray, " labels"] | None = None,
) -> Task:
  """A task over labelled texts, or whatever `load` loads.

  Args:
    name: the task's.
    labels: the class names in the order of their ids; () for regression, and
      where an example asks between choices (`Presentation.choices`).
    metrics: names that `metrics.score` knows, or `PROBABILITY`; the first is
      the score.
    read_split: (config.data.source, split) -> its examples, where these are
      texts.
    load: as `Task.load`, in place of tokenising these.
    dev_splits: the splits that are scored, the first one for the score that
      counts.
    test_splits: the splits that are answered where config.predict_test asks
      for it.
    write_answers: (folder, split, predictions, the examples' `index`) -> a
      file.
    to_texts: as `Task.to_texts`.
    presentation: as `Task.presentation`.
    kind: a name in `models.kinds`; None for classes, or for a number where
      there are neither labels nor choices.
    class_weights: what an example of each class counts in the training loss;
      None where all count the same. Scores are without them.
  """
  kind = kind or (CLASSES if labels or presentation.choices else NUMBER)

  def load_texts(
    config: ConfigDict,
    folder: Path,
    *,
    shards: int = 1,
    shard: ProcessShard = WHOLE,
  ) -> TaskData:
    """Read, cut to size, tokenise; choose the shapes to pack into."""
    splits = ["train", *dev_splits]
    if config.predict_test:
      splits += test_splits
    assert read_split is not None
    tokens = load_tokens(read_split, splits, data=config.data, folder=folder)
    layout = choose_layout(
      tokens["train"].lengths,
      batch_size=config.optim.batch_size,
      epochs=config.optim.epochs,
      shards=shards,
    )
    if config.optim.microbatch_rows is not None:
      layout = limit_rows(layout, config.optim.microbatch_rows, shards=shards)
    eval_layout = partial(
      choose_eval_layout, batch_size=config.eval_batch_size, shards=shards
    )
    return PackedData(
      tokens=tokens,
      train_layout=layout,
      eval_layouts={name: eval_layout(tokens[name].lengths) for name in splits},
      batch_size=config.optim.batch_size,
      max_length=config.data.max_length,
      shard=shard,
    )

  def evaluate(measure_batch: MeasureBatch, data: TaskData) -> Evaluation:
    """The metrics of every dev split."""

    def evaluate_split(split: str) -> Evaluation:
      logits = data.measured(split, measure_batch)
      if not np.isfinite(logits).all():
        return Evaluation({}, finite=False)
      answers, right = predictions(logits, kind), data.labels(split)
      known = [name for name in metrics if name != PROBABILITY]
      scores = score(known, answers, right)
      if PROBABILITY in metrics:
        # as batches of one slot
        one_slot = (jnp.asarray(x)[:, None] for x in (logits, right))
        losses = slot_losses(*one_slot)
        scores[PROBABILITY] = math.exp(-float(losses.mean()))
      scores = {name: scores[name] for name in metrics}
      table = None
      if kind == CLASSES and 0 < len(labels) <= MOST:
        table = confusion(answers, right, classes=len(labels))
      return Evaluation(scores, collapsed(answers), confusion=table)

    return evaluate_splits(dev_splits, evaluate_split)

  def answer(
    measure_batch: MeasureBatch, data: TaskData
  ) -> Callable[[Path], None]:
    """Computed by all processes; what is returned writes, in the first one."""
    assert isinstance(data, PackedData)  # only texts are asked for answers
    answers = {
      split: (
        predictions(data.measured(split, measure_batch), kind),
        data.tokens[split].index,
      )
      for split in test_splits
    }

    def write(folder: Path) -> None:
      assert write_answers is not None
      for split, (values, index) in answers.items():
        write_answers(folder, split, values, index)

    return write

  return Task(
    name=name,
    kind=kind,
    labels=labels,
    score_name=metrics[0],
    load=load or load_texts,
    loss=lambda outputs, batch: loss(
      example_logits(outputs, batch), batch, class_weights
    ),
    measure=example_logits,
    evaluate=evaluate,
    write_answers=answer if write_answers else None,
    to_texts=to_texts,
    presentation=presentation,
  )


def example_logits(
  outputs: Float[Array, "rows texts outputs"], batch: Mapping[str, Any]
) -> Float[Array, "rows slots labels"]:
  """The logits of each example: its text's outputs, or its choices' scores."""
  return outputs.reshape(*batch["weights"].shape, -1)


def slot_losses(
  logits: Float[Array, "rows slots labels"],
  labels: Num[Array, "rows slots *labels"],
) -> Float[Array, "rows slots"]:
  """The loss of each slot, by what its label is.

  Cross-entropy for a class id, squared error for a number; for a 0 or 1 for
  each label the mean over them of their sigmoids' cross-entropies.
  """
  if labels.ndim == logits.ndim:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), -1)
  if jnp.issubdtype(labels.dtype, jnp.floating):
    return jnp.square(logits[..., 0] - labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss(
  logits: Float[Array, "rows slots labels"],
  batch: Mapping[str, Any],
  class_weights: Float32[np.ndarray, " labels"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The examples' summed loss and their number; empty slots count nothing.

  With weights of the classes both are sums of what the examples count.
  """
  losses = slot_losses(logits, batch["labels"])
  weights = batch["weights"]
  if class_weights is not None:
    weights = weights * jnp.asarray(class_weights)[batch["labels"]]
    losses = losses * weights
  # where, so that a loss which is not finite in an empty slot is left out
  return jnp.sum(jnp.where(weights > 0, losses, 0)), jnp.sum(weights)


def predictions(logits: Logits, kind: str) -> np.ndarray:
  """Class ids, whether each label applies, or the values of a regression."""
  if kind == SEVERAL:
    return logits > 0  # a probability above one half
  return logits[:, 0] if kind == NUMBER else logits.argmax(-1)
