"""Metrics as fractions (scikit-learn and SciPy compute most of them).

The benchmarks' official ones: accuracy, F1 of class 1, Matthews correlation,
the mean of accuracy and macro F1; Pearson and Spearman correlation for
regression. For other data also F1 averaged over the classes (macro) or counted
over all of them (micro), and F1 of entities. A collapsed model (one prediction
for everything, how VeRA fails in the paper's Table 6) scores as such and never
as NaN.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The share of equal class ids."""
  return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """F1 of class 1; 0 where class 1 is neither predicted nor there."""
  from sklearn.metrics import f1_score

  return float(f1_score(labels, predictions, zero_division=0.0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Mean F1 of the classes, of class ids or of a 0 or 1 for each label."""
  from sklearn.metrics import f1_score

  average = "macro"
  return float(f1_score(labels, predictions, average=average, zero_division=0))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """F1 over all labels of all examples together."""
  from sklearn.metrics import f1_score

  average = "micro"
  return float(f1_score(labels, predictions, average=average, zero_division=0))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """(type, first word, word after the last) of each entity in BIO tags.

  As seqeval and conlleval count by default: an entity begins at B-, and also at
  an I- that doesn't go on with one of its type.
  """
  found, start, kind = set(), 0, ""
  for place, tag in enumerate([*tags, "O"]):
    mark, _, name = tag.partition("-")
    if kind and (mark != "I" or name != kind):
      found.add((kind, start, place))
      kind = ""
    if mark != "O" and not kind:
      start, kind = place, name
  return found


def entity_scores(
  predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> dict[str, float]:
  """F1, precision and recall of whole entities over all texts (micro average).

  An entity counts as found if type, first and last word agree. 0 where there is
  nothing to divide by.
  """
  right = predicted = there = 0
  for ours, theirs in zip(predictions, labels, strict=True):
    found, known = entities(ours), entities(theirs)
    right += len(found & known)
    predicted, there = predicted + len(found), there + len(known)
  return {
    "entity_f1": 2 * right / max(1, predicted + there),
    "entity_precision": right / max(1, predicted),
    "entity_recall": right / max(1, there),
  }


def accuracy_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The mean of accuracy and macro F1, as SuperGLUE scores imbalanced classes
  (Wang et al., 2019, section 3.2)."""
  return (accuracy(predictions, labels) + macro_f1(predictions, labels)) / 2


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Matthews correlation; 0, chance, when either side is one class."""
  if collapsed(predictions) or collapsed(labels):
    return 0.0
  from sklearn.metrics import matthews_corrcoef

  return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Pearson correlation; 0, no correlation, when either side is constant."""
  from scipy.stats import pearsonr

  return _correlation(pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Spearman's rank correlation; 0 when either side is constant."""
  from scipy.stats import spearmanr

  return _correlation(spearmanr, predictions, labels)


def _correlation(
  function: Callable, predictions: np.ndarray, labels: np.ndarray
) -> float:
  """A correlation of SciPy's, which would be 0 / 0 for a constant side."""
  if collapsed(predictions) or collapsed(labels):
    return 0.0
  sides = (np.asarray(side, np.float64) for side in (predictions, labels))
  return float(function(*sides).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "accuracy": accuracy,
  "f1": f1,
  "macro_f1": macro_f1,
  "micro_f1": micro_f1,
  "accuracy_f1": accuracy_f1,
  "matthews": matthews,
  "pearson": pearson,
  "spearman": spearman,
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


def collapsed(predictions: np.ndarray) -> bool:
  """Whether all predictions are the same: the paper's sign of failure."""
  predictions = np.asarray(predictions)
  return bool(predictions.size) and bool((predictions == predictions[:1]).all())
