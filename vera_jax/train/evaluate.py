"""A model's outputs and scores over a whole split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float32

from vera_jax.data.loader import eval_batches, eval_placement
from vera_jax.data.packing import Layout
from vera_jax.data.tokens import Tokens
from vera_jax.tasks.glue import GlueTask
from vera_jax.tasks.metrics import collapsed, score
from vera_jax.train.sharding import portion_of, put_rows

Logits = Float32[np.ndarray, "_ labels"]  # a split has its own length


def split_logits(
  step: Callable[..., jax.Array],
  params: Any,
  frozen: Any,
  tokens: Tokens,
  layout: Layout,
  *,
  sharding: NamedSharding,
) -> Logits:
  """The logits of every example, in the split's order.

  `step` gives every process all rows.
  """
  portion = portion_of(sharding)
  place = eval_placement(tokens, layout)
  rows = [  # read later: dispatch runs ahead
    step(params, frozen, put_rows(batch, sharding, portion))
    for batch in eval_batches(tokens, layout, place=place, shard=portion)
  ]
  return np.concatenate(rows)[place.row, place.slot]


def predictions(task: GlueTask, logits: Logits) -> np.ndarray:
  """Class ids, or the values themselves for regression."""
  return logits[:, 0] if task.regression else logits.argmax(-1)


def dev_scores(
  task: GlueTask, logits: Mapping[str, Logits], tokens: Mapping[str, Tokens]
) -> dict[str, float]:
  """GLUE's metrics over the dev splits; the task's score comes first.

  A second dev split (MNLI's mismatched) has its name behind the metric's.
  """
  scores: dict[str, float] = {}
  for split in task.dev_splits:
    labels = tokens[split].labels
    assert labels is not None  # load_split refuses dev splits without
    values = score(task.metrics, predictions(task, logits[split]), labels)
    tail = "" if split == task.dev_splits[0] else f"/{split}"
    scores |= {name + tail: value for name, value in values.items()}
  return scores


def is_collapsed(task: GlueTask, logits: Mapping[str, Logits]) -> bool:
  """Whether one and the same answer is given to everything (Table 6)."""
  return collapsed(predictions(task, logits[task.dev_splits[0]]))
