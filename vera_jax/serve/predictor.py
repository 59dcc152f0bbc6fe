"""Answers of a trained classifier to texts, packed as in training."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int
from scipy.special import expit

from vera_jax.data.examples import Examples
from vera_jax.data.loader import placed_batches
from vera_jax.data.packing import (
  Batch,
  Layout,
  per_token,
  place_all,
  with_adapters,
)
from vera_jax.data.texts import Line
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import Tokens, tokenise
from vera_jax.errors import UserError
from vera_jax.models.family import TEXTS
from vera_jax.models.kinds import CLASSES, SEVERAL, TAGS, WORDS
from vera_jax.pretrained.classifier import Classifier
from vera_jax.tasks.task import Task, task_named

ROWS = (1, 2, 4, 8, 16)  # of a batch: few shapes, for each is compiled
SHORTEST = 32  # tokens per row; longer ones are powers of two
# A tokenizer keeps where it cuts texts as a setting of its own, which a thread
# must not change under another's texts.
_TOKENIZING = threading.Lock()
Logits = Float32[np.ndarray, "texts labels"]


class Answer(NamedTuple):
  """One text's answer.

  `label` is "" for regression, whose `score` is the value itself; else `score`
  is the label's probability, and `probabilities` follow the classifier's order.
  Where several labels may apply, `labels` are those above one half, `label`
  joins them by "|", and `score` is the highest probability of all labels.
  """

  label: str
  score: float
  probabilities: tuple[float, ...]
  labels: tuple[str, ...] = ()


class Tagged(NamedTuple):
  """One text's words, the tag of each, and the tag's probability.

  A word of which the tokenizer leaves nothing has the first tag, at 0.
  """

  words: tuple[str, ...]
  tags: tuple[str, ...]
  scores: tuple[float, ...]


class Predictor:
  """A classifier with its tokenizer, compiled for a few shapes.

  Several threads may ask it at once.
  """

  def __init__(
    self, classifier: Classifier, *, max_length: int | None = None
  ) -> None:
    """`max_length` is the most tokens of a text; None: as in training."""
    if classifier.kind == WORDS:
      raise UserError(
        f"The model in {classifier.folder} writes texts; a Predictor answers"
        " questions about them. Use vera-jax generate."
      )
    if classifier.family.reads != TEXTS:
      raise UserError(
        f"The model in {classifier.folder} reads {classifier.family.reads}. Use"
        " an ImagePredictor."
      )
    self.classifier = classifier
    self.tokenizer = load_tokenizer(classifier.folder)
    if max_length is None:
      max_length = classifier.max_length
    self.max_length = min(max_length, classifier.room)
    self.truncated = 0  # texts that were cut, so far
    self._apply = jax.jit(classifier.module.apply)
    self.task = task_of(classifier)
    self.labels = (
      self.task and self.task.presentation.choices
    ) or classifier.labels

  def logits(
    self,
    first: Sequence[str] | Sequence[Sequence[str]],
    second: Sequence[str] | None = None,
  ) -> Logits:
    """What the head gives for every text, or pair of texts, in their order.

    Of a classifier that tags words they are those of every token.

    Args:
      first: the texts; none give an array without rows.
      second: the second text of each pair.

    Raises:
      UserError: what was given is no list of texts, or two lists of different
        lengths; the tokenizer has words that the classifier lacks; a logit is
        not a finite number.
    """
    return check_finite(self.any_logits(first, second))

  def any_logits(
    self,
    first: Sequence[str] | Sequence[Sequence[str]],
    second: Sequence[str] | None = None,
  ) -> Logits:
    """`logits` that may be infinite or no numbers."""
    tokens = self._encode(first, second)
    with _TOKENIZING:
      self.truncated += tokens.truncated
    return packed_logits(self._run, tokens, outputs=self.classifier.outputs)

  def answers(
    self,
    first: Sequence[str] | Sequence[Sequence[str]],
    second: Sequence[str] | None = None,
    *more: Sequence[str],
  ) -> list[Answer] | list[Tagged]:
    """Label, score and probabilities of every example, in their order.

    Of a classifier that tags words, the tags of each text's words: texts are
    lists of words then, or are split at spaces.

    Args:
      first: the examples' texts, column by column, as the task's own data have
        them: premises, first choices, second choices, questions.
      second: the second column, of tasks that have one.
      more: further columns.

    Raises:
      UserError: the task can't be asked about an example's texts.
    """
    if self.classifier.kind == TAGS:
      return self._tags(first)
    labels, kind = self.labels, self.classifier.kind
    columns: list[Any] = [x for x in (first, second, *more) if x is not None]
    if self.task is None or self.task.to_texts is None:
      return list(answers(self.logits(*columns), labels, kind=kind))
    names = self.task.presentation.columns[0]
    counts = {len(column) for column in columns}
    if len(columns) != len(names) or len(counts) > 1:
      raise UserError(
        f"{self.task.name} asks about {', '.join(names)}: give {len(names)}"
        " lists of texts, all of one length."
      )
    texts: list[tuple[str, ...]] = []
    for number, row in enumerate(zip(*columns, strict=True), 1):
      try:
        texts += self.task.to_texts(*row)
      except ValueError as error:
        raise UserError(f"Example {number}: {error}.") from error
    logits = self.logits(*map(list, zip(*texts, strict=True)))
    return list(answers(logits.reshape(len(first), -1), self.labels))

  def _tags(self, first: Sequence[Any]) -> list[Tagged]:
    """The tags of each text's words.

    A long text is answered in pieces: what one has no room for is the next.
    """
    labels = self.classifier.labels
    check_texts(first, words=True)
    texts = list(map(words_of, first))
    tags = [[labels[0]] * len(text) for text in texts]
    scores = [[0.0] * len(text) for text in texts]
    done = dict.fromkeys((i for i, text in enumerate(texts) if text), 0)
    while done:
      numbers = list(done)
      tokens = self._encode([texts[i][done[i] :] for i in numbers], None)
      logits = packed_logits(self._run, tokens, outputs=len(labels))
      check_finite(logits)
      assert tokens.words is not None
      for i, word, answer in zip(
        np.repeat(numbers, tokens.lengths).tolist(),
        tokens.words.tolist(),
        answers(logits, labels),  # of each token
        strict=True,
      ):
        if word >= 0:
          tags[i][done[i] + word] = answer.label
          scores[i][done[i] + word] = answer.score
      ends = np.maximum.reduceat(tokens.words, tokens.offsets[:-1])
      for i, last in zip(numbers, ends.tolist(), strict=True):
        done[i] += max(last, 0) + 1
        if done[i] >= len(texts[i]):
          del done[i]
    return [
      Tagged(tuple(text), tuple(of_text), tuple(chances))
      for text, of_text, chances in zip(texts, tags, scores, strict=True)
    ]

  def _encode(self, first: Any, second: Any) -> Tokens:
    check_texts(first, second, words=self.classifier.kind == TAGS)
    return encode(
      self.classifier, self.tokenizer, first, second, limit=self.max_length
    )

  def _run(self, batch: Batch) -> jax.Array:
    inputs = {name: batch[name] for name in self.classifier.inputs}
    return self._apply(self.classifier.variables, **inputs)


def words_of(text: str | Sequence[str]) -> list[str]:
  """A text's words: as given, or what stands between spaces."""
  return text.split() if isinstance(text, str) else list(text)


def answer_lines(
  predictor: Predictor, lines: Iterable[Line], *, at_once: int
) -> Iterator[tuple[Line, Answer | Tagged | None]]:
  """Each line with its answer, `at_once` of them answered together.

  The answer is None for a header and for a line that could not be read.
  """
  lines = iter(lines)
  while chunk := list(itertools.islice(lines, at_once)):
    good = [line.texts for line in chunk if line.texts]
    columns = [list(column) for column in zip(*good, strict=True)]
    made: Iterator[Any] = iter(predictor.answers(*columns) if good else [])
    for line in chunk:
      yield line, next(made) if line.texts else None


def task_of(classifier: Classifier) -> Task | None:
  """The task that a classifier was trained on. Unknown ones give None."""
  try:
    return _task_named(str(classifier.about.get("task")))
  except UserError:
    return None


_task_named = lru_cache(task_named)  # a bank asks for each text


def own_columns(classifier: Classifier) -> tuple[str, ...]:
  """The text columns that it was trained with; () where its file says none."""
  return tuple(map(str, classifier.about.get("columns") or ()))


def text_columns(classifier: Classifier) -> tuple[tuple[str, ...], ...]:
  """The names that its text columns may have: its own ones, or else its task's;
  () where they are not known."""
  columns, task = own_columns(classifier), task_of(classifier)
  return (columns,) if columns else task.presentation.columns if task else ()


def check_texts(first: Any, second: Any = None, *, words: bool = False) -> None:
  """Raises a UserError unless each is a list of texts, both of one length.

  With `words` a text may be the list of its words.
  """
  for texts in (first, second):
    if texts is None:
      continue
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
      raise UserError(
        "A list of texts is needed, also for one text: ['A fine film.']. Given"
        f" was a {type(texts).__name__}."
      )
    for i, text in enumerate(texts):
      parts = text if words and isinstance(text, list | tuple) else [text]
      if not all(isinstance(part, str) for part in parts):
        raise UserError(f"Text {i} is {text!r}, a {type(text).__name__}.")
  if second is not None and len(first) != len(second):
    raise UserError(
      f"There are {len(first)} first texts and {len(second)} second ones; each"
      " pair has one of both."
    )


def check_finite(logits: Logits) -> Logits:
  """The logits, or a UserError that names the texts of those not finite."""
  wrong = np.flatnonzero(~np.isfinite(logits).all(-1)).tolist()
  if wrong:
    raise UserError(
      f"The model's answer is not a finite number for {len(wrong)} of"
      f" {len(logits)} texts, the first of them number {wrong[0]} (from 0): the"
      " weights of base or adapter are too large for their type, or damaged."
    )
  return logits


def encode(
  classifier: Classifier,
  tokenizer: Any,
  first: Sequence[str] | Sequence[Sequence[str]],
  second: Sequence[str] | None,
  *,
  limit: int,
) -> Tokens:
  """The tokens of texts, or pairs, cut at `limit`.

  Raises:
    UserError: the limit has no room for a word, or the tokenizer has words that
      the classifier lacks.
  """
  with _TOKENIZING:
    special = tokenizer.num_special_tokens_to_add(pair=second is not None)
  if limit <= special:
    raise UserError(
      f"max_length is {limit}, but {special} tokens of each text are the"
      f" model's own marks: give {special + 1} or more."
    )
  texts: Any = first
  if classifier.kind == TAGS:
    texts = map(words_of, first)
  pairs = None if second is None else list(second)
  examples = Examples(list(texts), pairs, None, np.arange(len(first)))
  with _TOKENIZING:
    tokens = tokenise(examples, tokenizer, limit, None)
  highest, size = int(tokens.ids.max(initial=0)), classifier.config.vocab_size
  if highest >= size:
    raise UserError(
      f"The tokenizer of {classifier.folder} gave the id {highest}, but"
      f" the model's vocabulary ends before {size}."
    )
  return tokens


def packed_logits(
  run: Callable[[Batch], jax.Array],
  tokens: Tokens,
  *,
  outputs: int,
  adapters: Int[np.ndarray, " texts"] | None = None,
) -> Logits:
  """The logits of every text, packed into batches of few shapes.

  Of texts that are given as words, those of every token, in the tokens' order.

  Args:
    run: a packed batch -> its logits, slot by slot.
    tokens: the tokens of all texts.
    outputs: the number of logits per text.
    adapters: the adapter of each text. Texts of two adapters share no row, and
      `adapter` in a batch has the adapter of each row. None: all have the same.
  """
  if adapters is None:
    adapters = np.zeros(len(tokens), np.int64)
  if not len(tokens):
    return np.empty((0, outputs), np.float32)
  longest = int(tokens.lengths.max())
  length = max(SHORTEST, 1 << (longest - 1).bit_length())
  layout = Layout(ROWS, length, length // 4)
  places = place_all(tokens.lengths, layout, adapters=adapters)
  batches = placed_batches(tokens, places, layout)
  if tokens.words is not None:
    rows = [np.asarray(run(with_adapters(b, adapters))) for b in batches]
    return per_token(np.concatenate(rows), tokens, places)
  out = np.empty((len(tokens), outputs), np.float32)
  for batch in batches:
    logits = np.asarray(run(with_adapters(batch, adapters)))
    real = batch["example"] >= 0
    out[batch["example"][real]] = logits[real]
  return out


def answers(
  logits: Logits, labels: tuple[str, ...], *, kind: str = CLASSES
) -> Iterator[Answer]:
  """The answer of each row of logits; without labels, of a regression."""
  if not labels:
    for value in logits[:, 0].tolist():
      yield Answer("", value, ())
    return
  if kind == SEVERAL:
    for row in expit(logits).tolist():
      chosen = tuple(
        name for name, chance in zip(labels, row, strict=True) if chance > 0.5
      )
      yield Answer("|".join(chosen), max(row), tuple(row), chosen)
    return
  shifted = np.exp(logits - logits.max(-1, keepdims=True))
  for row in (shifted / shifted.sum(-1, keepdims=True)).tolist():
    best = int(np.argmax(row))
    yield Answer(labels[best], row[best], tuple(row))
