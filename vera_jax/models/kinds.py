"""What a model's outputs can mean: classes, a number, labels, tags, words.

The kind is stored with the adapter, so that prediction, merging and export know
it without the task's data.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vera_jax.errors import UserError

CLASSES = "classification"  # one of several classes, by softmax
NUMBER = "regression"  # a value
SEVERAL = "multi_label"  # any of several labels, each by a sigmoid
TAGS = "token_classification"  # a class for each word, by softmax
WORDS = "language_modelling"  # the next word at each position, by softmax


class Kind(NamedTuple):
  """A kind's head, and transformers' name for the problem (None: it has none).

  `head` is a key of `Family.classes`.
  """

  head: str
  problem_type: str | None


KINDS = {
  CLASSES: Kind("classification", "single_label_classification"),
  NUMBER: Kind("classification", "regression"),
  SEVERAL: Kind("classification", "multi_label_classification"),
  TAGS: Kind("token_classification", None),
  WORDS: Kind("language_modelling", None),
}
LABELLED = tuple(name for name in KINDS if name != WORDS)


def kind_of(about: Mapping[str, Any], labels: Sequence[str]) -> str:
  """The kind that adapter.json names; files without one tell by their labels.

  Raises:
    UserError: there is no such kind, or it doesn't go with the labels.
  """
  kind = about.get("kind") or (CLASSES if labels else NUMBER)
  needs = kind in (SEVERAL, TAGS)  # classes may be an example's choices
  none = kind in (NUMBER, WORDS)
  known = isinstance(kind, str) and kind in KINDS
  if not known or (labels if none else needs and not labels):
    raise UserError(
      f"The adapter's kind is {kind!r} with {len(labels)} labels. A kind is one"
      f" of {', '.join(KINDS)}; {NUMBER} and {WORDS} have no labels,"
      f" {SEVERAL} and {TAGS} have some."
    )
  return kind


def kind_of_problem(problem: Any) -> str | None:
  """The kind that a config.json's `problem_type` means, if there is one."""
  kinds = (name for name, kind in KINDS.items() if kind.problem_type == problem)
  return next(kinds, None) if problem else None
