"""Tags of words: packed, scored by entities, and not collapsed or infinite."""

import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.data.layout import choose_eval_layout
from vera_jax.data.loader import PackedData
from vera_jax.data.packing import Layout, pack_runs, per_token
from vera_jax.data.tokens import Tokens
from vera_jax.tasks.tagging import NOT_FINITE, best, tagging

LABELS = ("O", "B-A", "I-A")


@pytest.fixture
def data() -> PackedData:
  """Texts of 3, 1 and 2 words; ids are tags, 9 is a frame or a part of a word.

  The tags: B-A I-A O, O, B-A B-A.
  """
  ids = np.array([9, 1, 9, 2, 0, 9, 9, 0, 9, 9, 1, 1, 9], np.int32)
  words = np.array([-1, 0, -1, 1, 2, -1, -1, 0, -1, -1, 0, 1, -1], np.int32)
  tokens = Tokens(
    ids=ids,
    offsets=np.array([0, 6, 9, 13]),
    token_types=np.zeros(13, np.int32),
    labels=np.where(words >= 0, ids, 0).astype(np.int32),
    index=np.arange(3),
    truncated=0,
    pad_id=9,
    fingerprint="",
    words=words,
  )
  layout = choose_eval_layout(tokens.lengths, batch_size=2)
  return PackedData(
    tokens={"train": tokens, "dev": tokens},
    train_layout=Layout((2,), 10, 3),
    eval_layouts={"dev": layout},
    batch_size=2,
    max_length=8,
  )


def task(labels=LABELS):
  def read_split(source, split):
    raise AssertionError("nothing is read here")

  dev = ("dev",)
  return tagging("x", labels=labels, read_split=read_split, dev_splits=dev)


def test_only_the_beginnings_of_words_are_learned(data):
  tokens = data.tokens["dev"]
  ((batch,),) = pack_runs(tokens, [np.arange(3)], data.train_layout)
  begins = tokens.words >= 0
  place = data.eval_placement("dev")
  weights, labels = batch["weights"], batch["labels"]
  assert weights.shape == labels.shape == batch["input_ids"].shape
  assert weights.sum() == begins.sum() == 6
  assert (batch["input_ids"][weights > 0] != 9).all()
  np.testing.assert_array_equal(
    labels[weights > 0], batch["input_ids"][weights > 0]
  )
  rows = [b["input_ids"] for b in data.eval_batches("dev", place)]
  found = per_token(np.concatenate(rows), tokens, place)
  np.testing.assert_array_equal(found, tokens.ids)


def answers(batch):
  """Right but for the last text, whose words are taken for one entity."""
  tags = np.where(batch["input_ids"] == 9, 0, batch["input_ids"])
  is_last = (batch["input_ids"] == 1) & (batch["positions"] == 2)
  return np.where(is_last, 2, tags)


def test_entities_are_scored(data):
  found = task().evaluate(answers, data)
  assert list(found.scores) == [
    "entity_f1",
    "entity_precision",
    "entity_recall",
  ]
  # 1 right of 2 found and of 3 that are there
  assert list(found.scores.values()) == pytest.approx([2 / 5, 1 / 2, 1 / 3])
  assert found.finite and not found.collapsed
  assert task().evaluate(lambda b: 0 * b["input_ids"], data).collapsed


def test_other_tags_are_scored_by_word(data):
  found = task(("NOUN", "VERB", "X")).evaluate(answers, data)
  assert found.scores["accuracy"] == pytest.approx(5 / 6)
  assert task(("NOUN", "VERB")).score_name == "accuracy"


def test_a_logit_that_is_not_finite_is_seen(data):
  logits = jnp.array([[[0.0, 1.0], [jnp.nan, 0.0]]])
  np.testing.assert_array_equal(best(logits, {}), [[1, NOT_FINITE]])

  def broken(batch):
    return np.full_like(batch["input_ids"], NOT_FINITE)

  assert not task().evaluate(broken, data).finite
