"""Metrics as fractions, to the bit those of scikit-learn and SciPy.

The benchmarks' official ones: accuracy, F1 of class 1, Matthews correlation,
the mean of accuracy and macro F1; Pearson and Spearman correlation for
regression. For other data also F1 averaged over the classes (macro) or counted
over all of them (micro), and F1 of entities. A collapsed model (one prediction
for everything, how VeRA fails in the paper's Table 6) scores as such and never
as NaN.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The share of equal class ids."""
  return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray, *, average: str) -> float:
  """F1 of class ids, or of a 0 or 1 for each label; 0 where nothing is there.

  Args:
    predictions, labels: [examples], or [examples, labels].
    average: "binary", of class 1; "macro", the mean of the classes' F1; or
      "micro", over all labels of all examples together.
  """
  if labels.ndim == 1:
    classes = np.union1d(labels, predictions) if average != "binary" else [1]
    labels, predictions = (
      side[:, None] == classes for side in (labels, predictions)
    )
  axis = None if average == "micro" else 0
  right = np.sum((labels == 1) & (predictions == 1), axis)
  both = np.sum(labels == 1, axis) + np.sum(predictions == 1, axis)
  return float(np.mean(2.0 * right / np.maximum(1, both)))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """(type, first word, word after the last) of each entity in BIO tags.

  As seqeval and conlleval count by default: an entity begins at B-, and also at
  an I- that doesn't go on with one of its type.
  """
  spans, start, kind = set(), 0, ""
  for word, tag in enumerate([*tags, "O"]):
    mark, _, name = tag.partition("-")
    if kind and (mark != "I" or name != kind):
      spans.add((kind, start, word))
      kind = ""
    if mark != "O" and not kind:
      start, kind = word, name
  return spans


def entity_scores(
  predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> dict[str, float]:
  """F1, precision and recall of entities over all texts (micro average).

  An entity counts as found if type, first and last word agree. 0 where there is
  nothing to divide by.
  """
  right = predicted = there = 0
  for tags, correct_tags in zip(predictions, labels, strict=True):
    spans, correct = entities(tags), entities(correct_tags)
    right += len(spans & correct)
    predicted, there = predicted + len(spans), there + len(correct)
  return {
    "entity_f1": 2 * right / max(1, predicted + there),
    "entity_precision": right / max(1, predicted),
    "entity_recall": right / max(1, there),
  }


def accuracy_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The mean of accuracy and macro F1, as SuperGLUE scores imbalanced classes
  (Wang et al., 2019, section 3.2)."""
  macro = f1(predictions, labels, average="macro")
  return (accuracy(predictions, labels) + macro) / 2


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Matthews correlation; 0, chance, when either side is one class."""
  if collapsed(predictions) or collapsed(labels):
    return 0.0
  classes = np.union1d(labels, predictions)
  there, answered = (
    (side[:, None] == classes).sum(0, dtype=np.float64)
    for side in (labels, predictions)
  )
  n, right = float(len(labels)), float(np.sum(labels == predictions))
  spread = (n**2 - there @ there) * (n**2 - answered @ answered)
  return float((right * n - there @ answered) / np.sqrt(spread))


def correlation(
  predictions: np.ndarray, labels: np.ndarray, *, name: str
) -> float:
  """SciPy's "pearsonr" or "spearmanr"; 0, no correlation, when either side is
  constant, where it would be 0 / 0."""
  if collapsed(predictions) or collapsed(labels):
    return 0.0
  from scipy import stats

  sides = (np.asarray(side, np.float64) for side in (predictions, labels))
  return float(getattr(stats, name)(*sides).statistic)


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The mean over the labels' classes of the share that is answered right."""
  classes = np.unique(labels)
  return float(
    np.mean([(predictions[labels == c] == c).mean() for c in classes])
  )


def r2(predictions: np.ndarray, labels: np.ndarray) -> float:
  """1 less the squared error over the labels' variance; it orders models as the
  squared error does. 0 where the labels are constant."""
  if collapsed(labels):
    return 0.0
  left, there = (
    np.sum((labels - answer) ** 2) for answer in (predictions, labels.mean())
  )
  return float(1 - left / there)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "accuracy": accuracy,
  "f1": partial(f1, average="binary"),
  "macro_f1": partial(f1, average="macro"),
  "micro_f1": partial(f1, average="micro"),
  "accuracy_f1": accuracy_f1,
  "balanced_accuracy": balanced_accuracy,
  "matthews": matthews,
  "r2": r2,
  "pearson": partial(correlation, name="pearsonr"),
  "spearman": partial(correlation, name="spearmanr"),
}


def score(
  names: Iterable[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """Metrics by name, in the order of `names` (a task's `metrics`).

  Args:
    names: keys of `METRICS`.
    predictions, labels: [examples], class ids or regression values; or
      [examples, labels], a 0 or 1 for each label.

  Raises:
    ValueError: for no examples, unequal shapes, values that aren't finite.
  """
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  names = tuple(names)
  several = labels.ndim == 2 and set(names) <= {"macro_f1", "micro_f1"}
  if (
    predictions.shape != labels.shape
    or not (labels.ndim == 1 or several)
    or not labels.size
  ):
    raise ValueError(
      f"predictions {predictions.shape} and labels {labels.shape} must be "
      "one-dimensional, or for F1 two-dimensional, of one length, and not empty"
    )
  if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
    raise ValueError("predictions or labels are not finite")
  return {name: METRICS[name](predictions, labels) for name in names}


def confusion(
  predictions: np.ndarray, labels: np.ndarray, *, classes: int
) -> list[list[int]]:
  """How many examples of each class (a row) got each answer (a column)."""
  counts = np.zeros((classes, classes), int)
  np.add.at(counts, (labels, predictions), 1)
  return counts.tolist()


def class_scores(
  counts: Sequence[Sequence[int]],
) -> list[tuple[int, float, float, float]]:
  """(examples, precision, recall, F1) of each class, from `confusion`'s counts;
  0 where there is nothing to divide by."""
  table = np.asarray(counts)
  right, there, answered = np.diag(table), table.sum(1), table.sum(0)
  return [
    (
      int(n),
      float(k / max(1, a)),
      float(k / max(1, n)),
      float(2 * k / max(1, a + n)),
    )
    for k, n, a in zip(right, there, answered, strict=True)
  ]


def collapsed(predictions: np.ndarray) -> bool:
  """Whether all predictions are the same: the paper's sign of failure."""
  predictions = np.asarray(predictions)
  return bool(predictions.size) and bool((predictions == predictions[:1]).all())
