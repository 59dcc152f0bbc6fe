"""A tag for each word: named entities in BIO tags (B-PER I-PER O), or others.

A word is read at the first of its tokens; the others are neither learned nor
scored, and neither are words beyond config.data.max_length.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.examples import Examples
from vera_jax.data.loader import PackedData
from vera_jax.models.kinds import TAGS
from vera_jax.tasks.classification import classification
from vera_jax.tasks.metrics import collapsed, entity_scores, score
from vera_jax.tasks.task import (
  UNTITLED,
  Evaluation,
  Presentation,
  Task,
  evaluate_splits,
)

NOT_FINITE = -1  # in place of a tag


def tagging(
  name: str,
  *,
  labels: tuple[str, ...],
  read_split: Callable[[str, str], Examples],
  dev_splits: tuple[str, ...],
  presentation: Presentation = UNTITLED,
) -> Task:
  """A task over texts that are given as words.

  BIO tags are scored by entities, others by the share of words that are right.
  Data and loss are those of `classification`, whose arguments these are; but
  the outputs have a row for each token.
  """

  def evaluate(measure_batch: MeasureBatch, data: TaskData) -> Evaluation:
    """The scores of every dev split."""
    assert isinstance(data, PackedData)  # tags are of texts

    def evaluate_split(split: str) -> Evaluation:
      tokens, tags = data.tokens[split], data.measured(split, measure_batch)
      if (tags == NOT_FINITE).any():
        return Evaluation({}, finite=False)
      assert tokens.words is not None and tokens.labels is not None
      begins = tokens.words >= 0
      predicted, labelled = tags[begins], tokens.labels[begins]
      if are_bio(labels):
        # where the words of each text end, among all words
        ends = np.cumsum(begins)[tokens.offsets[1:-1] - 1]
        scores = entity_scores(
          *(
            [[labels[tag] for tag in text] for text in np.split(ids, ends)]
            for ids in (predicted, labelled)
          )
        )
      else:
        scores = score(("accuracy", "macro_f1"), predicted, labelled)
      return Evaluation(scores, collapsed(predicted))

    return evaluate_splits(dev_splits, evaluate_split)

  whole_texts = classification(
    name,
    labels=labels,
    metrics=("entity_f1" if are_bio(labels) else "accuracy",),
    read_split=read_split,
    dev_splits=dev_splits,
    presentation=presentation,
  )
  return whole_texts._replace(kind=TAGS, measure=best, evaluate=evaluate)


def are_bio(tags: Iterable[str]) -> bool:
  """Whether the tags are those of entities: O, B- and I- with a type."""
  return all(
    tag == "O" or (tag[:2] in ("B-", "I-") and tag[2:]) for tag in tags
  )


def best(
  logits: Float[Array, "rows length labels"], batch: Mapping[str, Any]
) -> Int[Array, "rows length"]:
  """The best tag of each token; `NOT_FINITE` where its logits are not."""
  finite = jnp.isfinite(logits).all(-1)
  return jnp.where(finite, logits.argmax(-1), NOT_FINITE)
