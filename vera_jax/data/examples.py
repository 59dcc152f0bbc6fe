"""Texts and labels of one split."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_jax.errors import UserError


@dataclass(frozen=True)
class Examples:
  """One split, in the order of its source.

  Attributes:
    first: the texts, or the first text of each pair, or the words of each, or
      conversations as JSON.
    second: the second texts; None for single sentences.
    labels: int32 class ids or float32 scores [examples], float32 0 or 1
      [examples, labels] where several may apply, or for words a list of int32
      class ids [words]; None for an unlabelled test.
    index: int64, the number of each example in its source, from 0 in a user's
      own files; or the one by which a submission file names it.
    choices: texts (or pairs) per example: 1, or the number of the choices
      between which an example asks. Those of an example follow one another, so
      `first` and `second` then have so many entries for each label.
    places: file and line of each, or file and row, for messages; None where
      nothing is said of a single one.
  """

  first: list[Any]
  second: list[str] | None
  labels: Any
  index: np.ndarray
  choices: int = 1
  places: list[str] | None = None

  def __len__(self) -> int:
    return len(self.first) // self.choices

  def place(self, number: int) -> str:
    """Where an example of one text is, for messages."""
    if self.places is None:
      return f"row {self.index[number] + 1}"
    return self.places[number]


def estimated_tokens(texts: Iterable[Any], examples: int) -> int:
  """About how many tokens an example has, before there is a tokenizer.

  Args:
    texts: all texts of the examples, or the words of each.
    examples: how many there are.
  """
  words = sum(len(t.split() if isinstance(t, str) else t) for t in texts)
  return 2 + round(1.3 * words / examples)  # a word has 1.3 tokens; two ends


def subset(examples: Examples, n: int | None, seed: int) -> Examples:
  """The first `n` examples after a seeded shuffle; all of them for None.

  The order is that of `np.random.default_rng(seed).permutation(len)[:n]`.

  Raises:
    UserError: `n` is more than the split has, so that no result claims more
      data than there were.
  """
  if n is None:
    return examples
  if not 0 < n <= len(examples):
    raise UserError(
      f"config.data.max_train_examples is {n}, but the split has "
      f"{len(examples)} examples: choose 1 to {len(examples)}, or leave it "
      "unset for all of them."
    )
  chosen = np.random.default_rng(seed).permutation(len(examples))[:n]
  return take(examples, chosen)


def drawn(count: int, most: int | None, *, seed: int) -> list[int]:
  """At most so many of `count` numbers, in their order."""
  order = np.random.default_rng(seed).permutation(count)
  return sorted(order[:most].tolist())


def take(examples: Examples, chosen: np.ndarray) -> Examples:
  """The examples of these numbers, in their order."""
  labels = examples.labels
  if isinstance(labels, list):
    labels = [labels[i] for i in chosen]
  elif labels is not None:
    labels = labels[chosen]
  choices = np.arange(examples.choices)
  texts = (chosen[:, None] * examples.choices + choices).ravel()
  return Examples(
    first=[examples.first[i] for i in texts],
    second=examples.second and [examples.second[i] for i in texts],
    labels=labels,
    index=examples.index[chosen],
    choices=examples.choices,
    places=examples.places and [examples.places[i] for i in chosen],
  )
