"""Language modelling: the next word of texts, or of completions alone.

Each learned token counts the same, whatever the text it is in: the loss of a
batch is their sum over their number. Label smoothing is part of what is
trained on; scores are without it.

What training makes a model forget is measured as in the MetaMathQA suite of
PEFT's method comparison: by the loss of a token of general texts, each from
those before it, in nats, before and after. No end-of-text token is counted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32
from ml_collections import ConfigDict

from vera_jax.data.answers import Answers
from vera_jax.data.completions import Completions, end_of_text
from vera_jax.data.data import MeasureBatch, TaskData
from vera_jax.data.examples import Examples
from vera_jax.data.loader import PackedData
from vera_jax.data.long_rows import choose_long_eval_rows, choose_long_rows
from vera_jax.data.packing import WHOLE, ProcessShard
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import Tokens, load_tokens
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
GENERAL = "general"  # the split of general texts


def language_modelling(
  name: str,
  *,
  read_split: Callable[[str, str], Examples],
  dev_splits: tuple[str, ...],
  completions: Completions | Answers,
  smoothing: float = 0.0,
  general: Examples | None = None,
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
    general: texts by whose loss is measured what was forgotten, if there are.
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
    if general is not None:
      tokens[GENERAL] = general_tokens(general, config.data, folder)
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
      for split in tokens
      if split != "train"
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
      loss, accuracy = split_loss(measure_batch, data, split)
      if not math.isfinite(loss):
        return Evaluation({}, finite=False)
      return Evaluation(
        {
          "token_probability": math.exp(-loss),
          "loss": loss,
          "perplexity": math.exp(min(loss, LARGEST)),
          "token_accuracy": accuracy,
        }
      )

    return evaluate_splits(dev_splits, evaluate_split)

  def general_loss(measure_batch: MeasureBatch, data: TaskData) -> float:
    loss, _ = split_loss(measure_batch, data, GENERAL)
    return loss

  return Task(
    name=name,
    kind=WORDS,
    labels=(),
    score_name="token_probability",
    load=load,
    loss=partial(loss, smoothing=smoothing),
    measure=measure,
    evaluate=evaluate,
    general_loss=None if general is None else general_loss,
    presentation=presentation,
    stored={"completions": completions._asdict()},
  )


def general_tokens(texts: Examples, data: ConfigDict, folder: Path) -> Tokens:
  """General texts as tokens, of which all but end-of-text are measured."""
  tokens = load_tokens(
    lambda source, split: texts,
    (GENERAL,),
    data=data,
    folder=folder,
    completions=Completions("right"),
  )[GENERAL]
  ends = tokens.ids == end_of_text(load_tokenizer(folder))
  return replace(tokens, learned=tokens.learned & ~ends)


def split_loss(
  measure_batch: MeasureBatch, data: TaskData, split: str
) -> tuple[float, float]:
  """(mean loss in nats, share of tokens that are the likeliest) of a split."""
  rows = [measure_batch(batch) for batch in data.eval_batches(split)]
  losses, hits, count = np.concatenate(rows).sum(0, dtype=np.float64)
  return float(losses / count), float(hits / count)


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
