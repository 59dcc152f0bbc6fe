"""Classification as a task: loss as sum and count, evaluation, answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.data.layout import choose_eval_layout
from vera_jax.data.loader import PackedData
from vera_jax.data.packing import Layout
from vera_jax.data.tokens import Tokens
from vera_jax.errors import UserError
from vera_jax.models.kinds import SEVERAL
from vera_jax.tasks.classification import classification, loss, predictions
from vera_jax.tasks.task import task_named


def test_the_loss_is_a_sum_and_a_count():
  """So that parts of a batch weigh every example alike."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 3, 2)).astype(np.float32)
  batch = {
    "labels": rng.integers(0, 2, (4, 3)).astype(np.int32),
    "weights": np.asarray(rng.random((4, 3)) < 0.6, np.float32),
  }
  batch = {name: jnp.asarray(x) for name, x in batch.items()}
  whole = loss(jnp.asarray(logits), batch)
  parts = [
    loss(jnp.asarray(logits[rows]), {k: x[rows] for k, x in batch.items()})
    for rows in (slice(0, 1), slice(1, 4))
  ]
  np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)
  assert whole[1] == batch["weights"].sum()


def test_an_empty_slot_counts_nothing_whatever_is_in_it():
  logits = jnp.asarray([[[1.0, 2.0], [jnp.nan, 0.0]]])
  batch = {"labels": jnp.array([[1, 0]]), "weights": jnp.array([[1.0, 0]])}
  total, count = loss(logits, batch)
  np.testing.assert_allclose(total, np.log(1 + np.exp(-1)), rtol=1e-6)
  assert count == 1


def test_weights_of_classes_are_torchs():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 1, 3)).astype(np.float32)
  labels = rng.integers(0, 3, (4, 1)).astype(np.int32)
  batch = {"labels": jnp.asarray(labels), "weights": jnp.ones((4, 1))}
  weights = np.array([0.5, 1, 3], np.float32)
  total, count = loss(jnp.asarray(logits), batch, weights)
  expected = torch.nn.CrossEntropyLoss(torch.tensor(weights))(
    torch.tensor(logits[:, 0]), torch.tensor(labels[:, 0]).long()
  )
  np.testing.assert_allclose(total / count, expected, rtol=1e-6)


def test_regression_is_squared_error():
  batch = {"labels": jnp.array([[2.5]]), "weights": jnp.ones((1, 1))}
  total, _ = loss(jnp.asarray([[[2.0]]]), batch)
  np.testing.assert_allclose(total, 0.25)


def test_several_labels_have_a_cross_entropy_each():
  labels = jnp.array([[[1.0, 0.0]]])
  batch = {"labels": labels, "weights": jnp.ones((1, 1))}
  total, count = loss(jnp.asarray([[[2.0, 1.0]]]), batch)
  expected = (np.log(1 + np.exp(-2.0)) + np.log(1 + np.exp(1.0))) / 2
  np.testing.assert_allclose(total / count, expected, rtol=1e-6)
  logits = np.array([[0.1, -1.0], [-2.0, -0.1]], np.float32)
  np.testing.assert_array_equal(predictions(logits, SEVERAL), [[1, 0], [0, 0]])


@pytest.fixture
def data() -> PackedData:
  """Six examples of one token, whose id is the label that they should get."""
  ids = np.array([0, 1, 1, 0, 1, 1], np.int32)
  tokens = Tokens(
    ids=ids,
    offsets=np.arange(7),
    token_types=np.zeros(6, np.int32),
    labels=ids.copy(),
    index=np.arange(10, 16),
    truncated=0,
    pad_id=9,
    fingerprint="",
  )
  layout = choose_eval_layout(tokens.lengths, batch_size=2)
  splits = {"train": tokens, "dev": tokens, "test": tokens}
  return PackedData(
    tokens=splits,
    train_layout=Layout((1,), 8, 8),
    eval_layouts=dict.fromkeys(splits, layout),
    batch_size=2,
    max_length=8,
  )


def task(**changes):
  settings = {
    "labels": ("no", "yes"),
    "metrics": ("accuracy", "f1"),
    "read_split": lambda source, split: None,
    "dev_splits": ("dev",),
    "test_splits": ("test",),
    **changes,
  }
  return classification("t", **settings)


def right(batch):
  """Logits of a model that reads the label off the first token."""
  first = np.take_along_axis(batch["input_ids"], batch["cls_positions"], 1)
  return np.eye(2, dtype=np.float32)[np.minimum(first, 1)]


def test_evaluation_puts_every_example_in_its_place(data):
  found = task().evaluate(right, data)
  assert found.scores == {"accuracy": 1.0, "f1": 1.0}
  assert list(found.scores)[0] == task().score_name
  assert found.finite and not found.collapsed


def test_the_loss_may_be_a_score_and_answers_are_counted(data):
  by_loss = task(metrics=("label_probability", "accuracy"))
  right = data.labels("dev")
  logits = np.log(np.where(np.eye(2)[right], 0.8, 0.2)).astype(np.float32)

  def evaluate(logits):
    def measure(batch):
      return logits[np.maximum(batch["example"], 0)]

    return by_loss.evaluate(measure, data)

  evaluation = evaluate(logits)
  assert list(evaluation.scores) == ["label_probability", "accuracy"]
  assert evaluation.scores["label_probability"] == pytest.approx(0.8)
  assert evaluation.confusion == np.diag(np.bincount(right)).tolist()
  worse = evaluate(0.5 * logits)
  assert worse.scores["accuracy"] == 1.0
  assert worse.scores["label_probability"] < 0.8


def test_one_answer_to_everything_and_no_numbers_are_seen(data):
  assert task().evaluate(lambda b: 0 * right(b), data).collapsed
  assert not task().evaluate(lambda b: np.nan * right(b), data).finite


def test_a_second_dev_split_has_its_name_behind_the_metric(data):
  found = task(dev_splits=("dev", "test")).evaluate(right, data)
  assert list(found.scores) == ["accuracy", "f1", "accuracy/test", "f1/test"]


def test_answers_are_computed_first_and_written_on_demand(data, tmp_path):
  written = []
  asked = task(write_answers=lambda *given: written.append(given))
  write = asked.write_answers(right, data)
  assert not written
  write(tmp_path)
  ((folder, split, answers, index),) = written
  assert (folder, split) == (tmp_path, "test")
  np.testing.assert_array_equal(answers, data.tokens["test"].labels)
  np.testing.assert_array_equal(index, np.arange(10, 16))


def test_an_unknown_task_lists_those_there_are():
  with pytest.raises(UserError, match="no task 'x'.*cola, sst2"):
    task_named("x")
