"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from vera_jax.tasks import superglue
from vera_jax.tasks.glue_facts import TASKS
from vera_jax.tasks.metrics import (
  METRICS,
  class_scores,
  collapsed,
  confusion,
  entity_scores,
  score,
)

LABELS = np.array([1, 1, 1, 0, 0, 1, 0, 0])
GUESSES = np.array([1, 1, 0, 0, 0, 1, 1, 1])
# 3 true and 2 false positives, 1 false and 2 true negatives


def test_classes_by_hand():
  result = score(["accuracy", "f1", "matthews"], GUESSES, LABELS)
  assert list(result) == ["accuracy", "f1", "matthews"]
  assert result["accuracy"] == 5 / 8
  assert result["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
  expected = (3 * 2 - 2 * 1) / np.sqrt((3 + 2) * (3 + 1) * (2 + 2) * (2 + 1))
  assert result["matthews"] == pytest.approx(expected)


def test_regression_by_hand():
  labels = np.array([1, 2, 3, 4], np.float32)
  guesses = np.array([1, 3, 2, 10], np.float32)
  result = score(["pearson", "spearman"], guesses, labels)
  # centred: (-1.5, -.5, .5, 1.5) and (-3, -1, -2, 6)
  assert result["pearson"] == pytest.approx(13 / np.sqrt(5 * 50))
  assert result["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_macro_f1_and_its_mean_with_accuracy_by_hand():
  labels = np.array([0, 0, 0, 1, 1, 2])
  guesses = np.array([0, 0, 1, 1, 0, 0])
  # F1 = 2 TP / (2 TP + FP + FN): 4/7 and 2/4 for two classes, 0 for the third
  result = score(["accuracy_f1", "accuracy", "macro_f1"], guesses, labels)
  assert result["accuracy"] == pytest.approx(3 / 6)
  assert result["macro_f1"] == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)
  expected = (3 / 6 + (4 / 7 + 2 / 4) / 3) / 2
  assert result["accuracy_f1"] == pytest.approx(expected)


def test_f1_matthews_and_r2_are_scikit_learns_to_the_bit():
  from sklearn import metrics

  rng = np.random.default_rng(0)
  for n in range(2, 40):
    labels, guesses = rng.integers(0, 1 + n // 2, (2, n))
    several = rng.integers(0, 2, (2, n, 3))
    several[:, :, 0] = 0  # a label that nothing has, nor is given
    values = rng.normal(size=(2, n)).astype(np.float32)
    pairs = [
      (METRICS["r2"], metrics.r2_score, values, {}),
      (METRICS["matthews"], metrics.matthews_corrcoef, (labels, guesses), {}),
      (METRICS["f1"], metrics.f1_score, (labels % 2, guesses % 2), {}),
    ]
    for average in ("macro", "micro"):
      ours, options = METRICS[f"{average}_f1"], {"average": average}
      pairs += [
        (ours, metrics.f1_score, sides, options)
        for sides in ((labels, guesses), several)
      ]
    for ours, theirs, (correct, answers), options in pairs:
      if theirs is metrics.f1_score:
        options = {**options, "zero_division": 0}
      assert ours(answers, correct) == theirs(correct, answers, **options)


def test_classes_apart_are_scikit_learns():
  from sklearn import metrics

  rng = np.random.default_rng(0)
  labels, guesses = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
  counts = confusion(
    guesses, labels, classes=5
  )  # one never guessed, one absent
  expected = metrics.confusion_matrix(labels, guesses, labels=range(5))
  np.testing.assert_array_equal(counts, expected)
  shares = metrics.precision_recall_fscore_support(
    labels, guesses, labels=range(5), zero_division=0
  )
  for number, (rows, *scores) in enumerate(class_scores(counts)):
    assert rows == shares[3][number]
    np.testing.assert_allclose(scores, [x[number] for x in shares[:3]])
  result = score(["balanced_accuracy"], guesses, labels)["balanced_accuracy"]
  assert result == pytest.approx(
    metrics.balanced_accuracy_score(labels, guesses)
  )
  values = rng.normal(size=(2, 9))
  assert score(["r2"], *values)["r2"] == pytest.approx(
    1 - ((values[0] - values[1]) ** 2).mean() / values[1].var()
  )


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("constant", [0, 1])
def test_a_collapsed_model_scores_without_nan_or_warning(name, constant):
  guesses = np.full(8, constant)
  value = score([name], guesses, LABELS)[name]
  assert np.isfinite(value)
  if name in ("matthews", "pearson", "spearman"):
    assert value == 0.0


def test_constant_labels():
  assert score(["matthews", "pearson"], GUESSES, np.ones(8, np.int64)) == {
    "matthews": 0.0,
    "pearson": 0.0,
  }


def test_collapsed():
  assert collapsed(np.array([2, 2, 2])) and collapsed(np.array([0.5]))
  assert not collapsed(np.array([2, 2, 1]))
  assert not collapsed(np.array([]))


@pytest.mark.parametrize(
  "guesses, labels",
  [
    (np.zeros(3), np.zeros(2)),
    (np.zeros(0), np.zeros(0)),
    (np.zeros((2, 1)), np.zeros((2, 1))),
    (np.array([np.nan, 1]), np.zeros(2)),
  ],
)
def test_what_can_not_be_scored(guesses, labels):
  with pytest.raises(ValueError):
    score(["accuracy"], guesses, labels)


def test_every_task_has_known_metrics():
  tasks = [*TASKS.values(), *superglue.TASKS.values()]
  assert {name for task in tasks for name in task.metrics} <= set(METRICS)
  assert TASKS["cola"].metrics[0] == "matthews"
  assert TASKS["stsb"].metrics[0] == "pearson"
  assert TASKS["mrpc"].metrics[0] == "accuracy"


@pytest.mark.parametrize(
  "ours, theirs, f1, precision, recall",
  [
    # seqeval's own example
    (
      ["O O B-M I-M I-M I-M O", "B-P I-P O"],
      ["O O O B-M I-M I-M O", "B-P I-P O"],
      *(1 / 2, 1 / 2, 1 / 2),
    ),
    (["O O"], ["O B-A"], 0, 0, 0),
    (["B-A B-A"], ["B-A I-A"], 0, 0, 0),
    # an I- begins an entity where none of its type goes on
    (["I-A O I-A I-B"], ["B-A O B-A B-B"], 1, 1, 1),
    (["B-A I-B"], ["B-A B-B"], 1, 1, 1),
    (["B-A O B-B"], ["B-A O O"], 2 / 3, 1 / 2, 1),
    (["O"], ["O"], 0, 0, 0),
  ],
)
def test_entities_count_as_seqeval_counts_them(
  ours, theirs, f1, precision, recall
):
  split = [[text.split() for text in side] for side in (ours, theirs)]
  assert entity_scores(*split) == pytest.approx(
    {"entity_f1": f1, "entity_precision": precision, "entity_recall": recall}
  )


def test_averages_over_classes_and_labels():
  ids = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
  assert score(["macro_f1"], *ids)["macro_f1"] == pytest.approx(7 / 9)
  marks = np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]])
  scores = score(["micro_f1", "macro_f1"], *marks)
  assert list(scores.values()) == pytest.approx([2 / 3, 2 / 3])
  assert collapsed(np.array([[1, 0], [1, 0]])) and not collapsed(marks[0])
