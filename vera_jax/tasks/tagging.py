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

from vera_jax.data.examples import Examples
from vera_jax.data.loader import PackedData
from vera_jax.data.packing import per_token
from vera_jax.models.kinds import KINDS, TAGS
from vera_jax.tasks.classification import classification
from vera_jax.tasks.metrics import collapsed, entity_scores, score
from vera_jax.tasks.task import Evaluation, Task

MeasureBatch = Callable[[Mapping[str, Any]], Any]
NOT_FINITE = -1  # in place of a tag


def tagging(
  name: str,
  *,
  labels: tuple[str, ...],
  read_split: Callable[[str, str], Examples],
  dev_splits: tuple[str, ...],
) -> Task:
  """A task over texts that are given as words.

  BIO tags are scored by entities, others by the share of words that are right.
  Data and loss are those of `classification`, whose arguments these are; but
  the outputs have a row for each token.
  """

  def evaluate(measure_batch: MeasureBatch, data: PackedData) -> Evaluation:
    """Scores of every dev split; a second one's have its name behind them."""
    scores: dict[str, float] = {}
    one_answer = False
    for split in dev_splits:
      tokens, place = data.tokens[split], data.eval_placement(split)
      rows = [measure_batch(batch) for batch in data.eval_batches(split, place)]
      answers = per_token(np.concatenate(rows), tokens, place)
      if (answers == NOT_FINITE).any():
        return Evaluation({}, finite=False)
      assert tokens.words is not None and tokens.labels is not None
      begins = tokens.words >= 0
      # where the words of each text end, among all words
      ends = np.cumsum(begins)[tokens.offsets[1:-1] - 1]
      found, known = answers[begins], tokens.labels[begins]
      if are_bio(labels):
        ours, theirs = (
          [[labels[tag] for tag in text] for text in np.split(ids, ends)]
          for ids in (found, known)
        )
        values = entity_scores(ours, theirs)
      else:
        values = score(("accuracy", "macro_f1"), found, known)
      tail = "" if split == dev_splits[0] else f"/{split}"
      scores |= {name + tail: value for name, value in values.items()}
      if split == dev_splits[0]:
        one_answer = collapsed(found)
    return Evaluation(scores, one_answer)

  whole_texts = classification(
    name,
    labels=labels,
    metrics=("entity_f1" if are_bio(labels) else "accuracy",),
    read_split=read_split,
    dev_splits=dev_splits,
  )
  return whole_texts._replace(
    head=KINDS[TAGS].head, kind=TAGS, measure=best, evaluate=evaluate
  )


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
