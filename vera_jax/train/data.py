"""A task's data for a run: read, cut to size, tokenised, shapes chosen."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from vera_jax.data.examples import subset
from vera_jax.data.layout import choose_eval_layout, choose_layout, limit_rows
from vera_jax.data.packing import Layout
from vera_jax.data.tokens import FolderTokenizer, Tokens, tokenise
from vera_jax.tasks.glue import GlueTask, glue_task
from vera_jax.tasks.glue_data import load_split


class Data(NamedTuple):
  """A task's tokens by split, and the shapes they are packed into."""

  task: GlueTask
  tokens: dict[str, Tokens]
  train_layout: Layout
  eval_layouts: dict[str, Layout]


def cache_dir(config: ConfigDict) -> Path:
  """Where tokenised data is kept: config.data.cache_dir, or the user's."""
  chosen = config.data.cache_dir or "~/.cache/vera_jax/tokens"
  return Path(chosen).expanduser()


def build_data(config: ConfigDict, *, folder: Path, shards: int) -> Data:
  """Read, cut to size and tokenise the splits that the run needs."""
  task = glue_task(config.task)
  splits = ["train", *task.dev_splits]
  if config.predict_test:
    splits += task.test_splits
  tokenizer = FolderTokenizer(folder, cache_dir(config))
  tokens = {}
  for name in splits:
    examples = load_split(task, config.data.source, name)
    if name == "train":
      size, seed = config.data.max_train_examples, config.data.subset_seed
      examples = subset(examples, size, seed)
    tokens[name] = tokenise(
      examples, tokenizer, config.data.max_length, cache_dir(config)
    )
  plan = partial(
    choose_eval_layout, batch_size=config.eval_batch_size, shards=shards
  )
  layout = choose_layout(
    tokens["train"].lengths,
    batch_size=config.optim.batch_size,
    epochs=config.optim.epochs,
    shards=shards,
  )
  if config.optim.pass_rows is not None:
    layout = limit_rows(layout, config.optim.pass_rows, shards=shards)
  return Data(
    task=task,
    tokens=tokens,
    train_layout=layout,
    eval_layouts={name: plan(tokens[name].lengths) for name in splits[1:]},
  )
