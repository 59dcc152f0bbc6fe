"""Whole texts, or images: classes, several labels or a number, and choices.

Each example has one row of logits. A text that is classified has them from the
head's outputs. An example that asks between choices is one text per choice,
which the head scores with a single output; the scores of an example's texts are
its logits, so that loss, metrics and answers are those of classification.
"""

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

from vera_jax.data.examples import Examples
from vera_jax.data.image_batches import ImageData
from vera_jax.data.layout import choose_eval_layout, choose_layout, limit_rows
from vera_jax.data.loader import PackedData
from vera_jax.data.packing import ProcessShard
from vera_jax.data.tokens import load_tokens
from vera_jax.models.kinds import CLASSES, KINDS, NUMBER, SEVERAL
from vera_jax.tasks.metrics import collapsed, score
from vera_jax.tasks.task import Evaluation, Form, Size, Task

Logits = Float32[np.ndarray, "examples labels"]
MeasureBatch = Callable[[Mapping[str, Any]], Any]
Data = PackedData | ImageData


def classification(
  name: str,
  *,
  labels: tuple[str, ...],
  choices: tuple[str, ...] = (),
  metrics: tuple[str, ...],
  read_split: Callable[[str, str], Examples] | None = None,
  load: Callable[..., Any] | None = None,
  dev_splits: tuple[str, ...],
  test_splits: tuple[str, ...] = (),
  write_answers: Callable[..., Any] | None = None,
  columns: tuple[tuple[str, ...], ...] = (),
  form: Form | None = None,
  title: str = "",
  size: Size | None = None,
  kind: str | None = None,
) -> Task:
  """A task over labelled texts, or whatever `load` loads.

  Args:
    name: the task's.
    labels: the class names in the order of their ids; () for regression.
    choices: the names of an example's choices, where it asks between texts
      (`Examples.choices` of them); there are no labels then.
    metrics: names that `metrics.score` knows; the first is the score.
    read_split: (config.data.source, split) -> its examples, where these are
      texts.
    load: as `Task.load`, in place of tokenising these.
    dev_splits: scored, the first one for the score that counts.
    test_splits: answered where config.predict_test asks for it.
    write_answers: (folder, split, predictions, index) -> a file.
    columns: names that the text columns of input files may have.
    form: what the model reads for the texts of these columns (`Task.form`).
    title: as a reader knows the task.
    size: of the data as they are published.
    kind: in `models.kinds`; None for classes, or a number without labels.
  """
  kind = kind or (CLASSES if labels or choices else NUMBER)

  def load_texts(
    config: ConfigDict, folder: Path, shards: int, shard: ProcessShard
  ) -> PackedData:
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
    if config.optim.pass_rows is not None:
      layout = limit_rows(layout, config.optim.pass_rows, shards=shards)
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

  def evaluate(measure_batch: MeasureBatch, data: Data) -> Evaluation:
    """The metrics of every dev split. A second one (MNLI's mismatched) has its
    name behind the metric's."""
    scores: dict[str, float] = {}
    finite, answers = True, {}
    for split in dev_splits:
      logits = split_logits(measure_batch, data, split)
      if not np.isfinite(logits).all():
        return Evaluation({}, finite=False)
      answers[split] = predictions(logits, kind)
      known = data.labels(split)
      assert known is not None  # a dev split without labels is refused
      tail = "" if split == dev_splits[0] else f"/{split}"
      values = score(metrics, answers[split], known)
      scores |= {name + tail: value for name, value in values.items()}
    return Evaluation(scores, collapsed(answers[dev_splits[0]]), finite)

  def answer(
    measure_batch: MeasureBatch, data: PackedData, folder: Path
  ) -> Callable[[], None]:
    """Computed by all processes; what is returned writes, in the first one."""
    found = {
      split: predictions(split_logits(measure_batch, data, split), kind)
      for split in test_splits
    }

    def write() -> None:
      assert write_answers is not None
      for split, values in found.items():
        write_answers(folder, split, values, data.tokens[split].index)

    return write

  return Task(
    name=name,
    head=KINDS[kind].head,
    outputs=len(labels) or 1,
    labels=labels,
    kind=kind,
    choices=choices,
    score_name=metrics[0],
    load=load or load_texts,
    loss=lambda outputs, batch: loss(example_logits(outputs, batch), batch),
    measure=example_logits,
    evaluate=evaluate,
    write_answers=answer if write_answers else None,
    columns=columns,
    form=form,
    title=title,
    size=size,
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
  logits: Float[Array, "rows slots labels"], batch: Mapping[str, Any]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The examples' summed loss and their number; empty slots count nothing."""
  losses = slot_losses(logits, batch["labels"])
  weights = batch["weights"]
  # where, so that a loss which is not finite in an empty slot is left out
  return jnp.sum(jnp.where(weights > 0, losses, 0)), jnp.sum(weights)


def split_logits(measure_batch: MeasureBatch, data: Data, split: str) -> Logits:
  """The logits of every example, in the split's order."""
  place = data.eval_placement(split)
  # read after the last batch is sent, so that the device never waits
  rows = [measure_batch(batch) for batch in data.eval_batches(split, place)]
  return np.concatenate(rows)[place.row, place.slot]


def predictions(logits: Logits, kind: str) -> np.ndarray:
  """Class ids, whether each label applies, or the values of a regression."""
  if kind == SEVERAL:
    return logits > 0  # a probability above one half
  return logits[:, 0] if kind == NUMBER else logits.argmax(-1)
