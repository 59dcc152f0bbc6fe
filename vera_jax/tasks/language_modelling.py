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
from vera_jax.data.examples import Examples
from vera_jax.data.loader import PackedData
from vera_jax.data.long_rows import choose_long_eval_rows, choose_long_rows
from vera_jax.data.packing import ProcessShard
from vera_jax.data.tokens import load_tokens
from vera_jax.errors import UserError
from vera_jax.models.decoder import Words
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.operations.cross_entropy import cross_entropy, score_words
from vera_jax.tasks.task import Evaluation, Size, Task

MeasureBatch = Callable[[Mapping[str, Any]], Any]
LARGEST = 700.0  # nats whose exponential is still a number


def language_modelling(
  name: str,
  *,
  read_split: Callable[[str, str], Examples],
  dev_splits: tuple[str, ...],
  completions: Completions | Answers,
  smoothing: float = 0.0,
  title: str = "",
  size: Size | None = None,
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
    title: as a reader knows the task.
    size: of the data, if it is known.

  Raises:
    UserError: another smoothing than a share.
  """
  if not 0 <= smoothing < 1:
    raise UserError(
      f"config.optim.label_smoothing is {smoothing}; it is a share of the loss,"
      " from 0 to below 1."
    )

  def load(
    config: ConfigDict, folder: Path, shards: int, shard: ProcessShard
  ) -> PackedData:
    """Read, cut to size, tokenise; choose the shapes to pack into."""
    tokens = load_tokens(
      read_split,
      ("train", *dev_splits),
      data=config.data,
      folder=folder,
      completions=completions,
    )
    train, batch_size = tokens["train"], config.optim.batch_size
    assert train.reads is not None  # words are learned
    eval_layouts = {}
    for split in dev_splits:
      own = tokens[split]
      assert own.reads is not None
      eval_layouts[split] = choose_long_eval_rows(
        own.lengths,
        own.reads,
        batch_size=config.eval_batch_size,
        shards=shards,
      )
    return PackedData(
      tokens=tokens,
      train_layout=choose_long_rows(
        train.lengths,
        train.reads,
        batch_size=batch_size,
        epochs=config.optim.epochs,
        shards=shards,
        pass_rows=config.optim.pass_rows,
      ),
      eval_layouts=eval_layouts,
      batch_size=batch_size,
      max_length=config.data.max_length,
      shard=shard,
      cut=completions.cut,
    )

  def evaluate(measure_batch: MeasureBatch, data: PackedData) -> Evaluation:
    """The scores of every dev split. A second one has its name behind them."""
    scores: dict[str, float] = {}
    for split in dev_splits:
      rows = [measure_batch(batch) for batch in data.eval_batches(split)]
      losses, hits, count = np.concatenate(rows).sum(0, dtype=np.float64)
      if not math.isfinite(losses):
        return Evaluation({}, finite=False)
      loss = float(losses / count)
      values = {
        "token_probability": math.exp(-loss),
        "loss": loss,
        "perplexity": math.exp(min(loss, LARGEST)),
        "token_accuracy": float(hits / count),
      }
      tail = "" if split == dev_splits[0] else f"/{split}"
      scores |= {name + tail: value for name, value in values.items()}
    return Evaluation(scores)

  return Task(
    name=name,
    head=KINDS[WORDS].head,
    outputs=0,
    labels=(),
    kind=WORDS,
    score_name="token_probability",
    load=load,
    loss=partial(loss, smoothing=smoothing),
    measure=measure,
    evaluate=evaluate,
    title=title,
    size=size,
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
  found = (jnp.where(learned, losses, 0), learned & hits, learned)
  sums = [jnp.sum(array, axis=-1, dtype=jnp.float32) for array in found]
  return jnp.stack(sums, axis=-1)
