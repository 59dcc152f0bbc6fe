"""Answers of a trained classifier to texts, packed as in training."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from vera_jax.classifier import Classifier
from vera_jax.data.batches import eval_batches
from vera_jax.data.examples import Examples
from vera_jax.data.packing import Layout
from vera_jax.data.placement import place_all
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import Tokens, tokenise
from vera_jax.errors import UserError
from vera_jax.models.bert import INPUTS

ROWS = (1, 4, 16)  # of a batch: few shapes, for each is compiled
SHORTEST = 32  # tokens a row; longer ones are powers of two
Logits = Float32[np.ndarray, "texts labels"]


class Answer(NamedTuple):
  """One text's answer.

  `label` is "" for regression, whose `score` is the value itself; else `score`
  is the label's probability, and `probabilities` follow the classifier's order.
  """

  label: str
  score: float
  probabilities: tuple[float, ...]


class Predictor:
  """A classifier with its tokenizer, compiled for a few shapes."""

  def __init__(
    self, classifier: Classifier, *, max_length: int | None = None
  ) -> None:
    """`max_length` is the most tokens of a text; None: as in training."""
    self.classifier = classifier
    self.tokenizer = load_tokenizer(classifier.folder)
    room = classifier.room
    trained = classifier.about.get("max_length")
    known = trained if isinstance(trained, int) else room
    self.max_length = min(max_length or known, room)
    self.truncated = 0  # texts that were cut, so far
    self._apply = jax.jit(partial(_apply, classifier.module))

  def logits(
    self, first: Sequence[str], second: Sequence[str] | None = None
  ) -> Logits:
    """The logits of every text, or pair of texts, in their order."""
    tokens = self._tokens(first, second)
    layout = _layout(tokens)
    out = np.empty((len(tokens), self._outputs), np.float32)
    for batch in eval_batches(tokens, layout):
      inputs = {name: batch[name] for name in INPUTS}
      logits = np.asarray(self._apply(self.classifier.variables, inputs))
      real = batch["example"] >= 0
      out[batch["example"][real]] = logits[real]
    return out

  def answers(
    self, first: Sequence[str], second: Sequence[str] | None = None
  ) -> list[Answer]:
    """Label, score and probabilities of every text, in their order."""
    return list(_answers(self.logits(first, second), self.classifier.labels))

  @property
  def _outputs(self) -> int:
    return len(self.classifier.labels) or 1

  def _tokens(
    self, first: Sequence[str], second: Sequence[str] | None
  ) -> Tokens:
    examples = Examples(
      list(first),
      None if second is None else list(second),
      None,
      np.arange(len(first)),
    )
    tokens = tokenise(examples, self.tokenizer, self.max_length, None)
    self.truncated += tokens.truncated
    highest, size = int(tokens.ids.max()), self.classifier.config.vocab_size
    if highest >= size:
      raise UserError(
        f"The tokenizer of {self.classifier.folder} gave the id {highest}, but"
        f" the model's vocabulary ends before {size}."
      )
    return tokens


def _apply(module: Any, variables: Any, inputs: Any) -> jax.Array:
  return module.apply(variables, **inputs)


def _layout(tokens: Tokens) -> Layout:
  """One of few shapes with room for these texts."""
  longest = int(tokens.lengths.max())
  length = max(SHORTEST, 1 << (longest - 1).bit_length())
  layout = Layout((), length, length // 4)
  needed = place_all(tokens.lengths, layout).rows
  rows = next((rows for rows in ROWS if rows >= needed), ROWS[-1])
  return layout._replace(rows=(rows,))


def _answers(logits: Logits, labels: tuple[str, ...]) -> Iterator[Answer]:
  if not labels:
    for value in logits[:, 0].tolist():
      yield Answer("", value, ())
    return
  shifted = np.exp(logits - logits.max(-1, keepdims=True))
  for row in (shifted / shifted.sum(-1, keepdims=True)).tolist():
    best = int(np.argmax(row))
    yield Answer(labels[best], row[best], tuple(row))
