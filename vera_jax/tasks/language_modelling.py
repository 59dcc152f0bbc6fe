"""Language modelling: the next word of texts, or of completions alone.

Each learned token counts the same, whatever the text it is in: the loss of a
batch is their sum over their number. Label smoothing is part of what is
trained on; scores are without it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32
from ml_collections import ConfigDict

from vera_jax.data.answers import Answers
from vera_jax.data.completions import Completions
from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.examples import Examples
from vera_jax.data.loader import PackedData
from vera_jax.data.long_rows import choose_long_eval_rows, choose_long_rows
from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.data.tokens import load_tokens
from vera_jax.errors import UserError
from vera_jax.models.decoder import Words
from vera_jax.models.kinds import WORDS
from vera_jax.operations.cross_entropy import cross_entropy, score_words
from vera_jax.tasks.task import (
  UNTITLED,
  Evaluation,
  Presentation,
  Task,
  evaluate_splits,
)

LARGEST = 700.0  # nats whose exponential is still a number


def language_modelling(
  name: str,
  *,
  read_split: Callable[[str, str], Examples],
  dev_splits: tuple[str, ...],
  completions: Completions | Answers,
  smoothing: float = 0.0,
  presentation: Presentation = UNTITLED,
) -> Task:
  """A task over texts, or over prompts and their completions.

  The score is the mean probability of the right token, the geometric mean: one
  over the perplexity. It is between 0 and 1, and the epoch of its highest value
  is that of the lowest loss.

  Args:
    name: the task's.
    read_split: (config.data.source, split) -> its examples: `first` are the
      texts, or the prompts where `second` has completions, or conversations;
      no labels.
    dev_splits: scored, the first one for the score that counts.
    completions: how they become tokens, and which are learned.
    smoothing: of the labels in training, see `cross_entropy`.
    presentation: as `Task.presentation`.

  Raises:
    UserError: another smoothing than a share.
  """
  if not 0 <= smoothing < 1:
    raise UserError(
      f"config.optim.label_smoothing is {smoothing}; it is a share of the loss,"
      " from 0 to below 1."
    )

  def load(
    config: ConfigDict,
    folder: Path,
    *,
    shards: int = 1,
    shard: ProcessShard = WHOLE,
  ) -> TaskData:
    """Read, cut to size, tokenise; choose the shapes to pack into."""
    tokens = load_tokens(
      read_split,
      ("train", *dev_splits),
      data=config.data,
      folder=folder,
      completions=completions,
    )
    lengths = {split: one.lengths for split, one in tokens.items()}
    # words are learned, so every split has reads
    reads = {split: np.asarray(one.reads) for split, one in tokens.items()}
    eval_layouts = {
      split: choose_long_eval_rows(
        lengths[split],
        reads[split],
        batch_size=config.eval_batch_size,
        shards=shards,
      )
      for split in dev_splits
    }
    return PackedData(
      tokens=tokens,
      train_layout=choose_long_rows(
        lengths["train"],
        reads["train"],
        batch_size=config.optim.batch_size,
        epochs=config.optim.epochs,
        shards=shards,
        microbatch_rows=config.optim.microbatch_rows,
      ),
      eval_layouts=eval_layouts,
      batch_size=config.optim.batch_size,
      max_length=config.data.max_length,
      shard=shard,
      cut=completions.cut,
    )

  def evaluate(measure_batch: MeasureBatch, data: TaskData) -> Evaluation:
    """The scores of every dev split."""

    def evaluate_split(split: str) -> Evaluation:
      rows = [measure_batch(batch) for batch in data.eval_batches(split)]
      losses, hits, count = np.concatenate(rows).sum(0, dtype=np.float64)
      if not math.isfinite(losses):
        return Evaluation({}, finite=False)
      loss = float(losses / count)
      return Evaluation(
        {
          "token_probability": math.exp(-loss),
          "loss": loss,
          "perplexity": math.exp(min(loss, LARGEST)),
          "token_accuracy": float(hits / count),
        }
      )

    return evaluate_splits(dev_splits, evaluate_split)

  return Task(
    name=name,
    kind=WORDS,
    labels=(),
    score_name="token_probability",
    load=load,
    loss=partial(loss, smoothing=smoothing),
    measure=measure,
    evaluate=evaluate,
    presentation=presentation,
    stored={"completions": completions._asdict()},
  )


def loss(
  words: Words, batch: Mapping[str, Any], *, smoothing: float = 0.0
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
  """(sum over the learned tokens, their number), in nats."""
  losses = cross_entropy(*words, batch["labels"], smoothing=smoothing)
  weights = batch["weights"]
  # where, so that a loss which is not finite in an empty read is left out
  return jnp.sum(jnp.where(weights > 0, losses, 0)), jnp.sum(weights)


def measure(
  words: Words, batch: Mapping[str, Any]
) -> Float32[Array, "rows sums"]:
  """Of each row: its summed loss in nats, how many of its learned tokens are
  the likeliest ones, and how many there are."""
  losses, hits = score_words(*words, batch["labels"])
  learned = batch["weights"] > 0
  of_reads = (jnp.where(learned, losses, 0), learned & hits, learned)
  sums = [jnp.sum(array, axis=-1, dtype=jnp.float32) for array in of_reads]
  return jnp.stack(sums, axis=-1)
