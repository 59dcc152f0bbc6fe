"""Answers to texts: packing changes none, order is kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.predictor import ROWS, Predictor, check_texts

RNG = np.random.default_rng(0)
TEXTS = [
  " ".join(RNG.choice([f"word{i}" for i in range(25)], 1 + i % 9))
  for i in range(150)
]


def predictor(folder, **options):
  return Predictor(restore_adapter(load_adapter(folder)), **options)


@pytest.fixture(scope="module")
def model(random_adapter):
  """It counts what it cuts, and its tokenizer can be changed: not here."""
  return predictor(random_adapter(task="sst2"))


def test_packed_answers_are_those_of_each_alone(model):
  together = model.logits(TEXTS)  # several batches of several rows
  assert sum(len(text.split()) + 2 for text in TEXTS) > 32 * ROWS[-1]
  for i in (0, 7, 60, 149):
    alone = model.logits([TEXTS[i]])
    np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=1e-5)
  assert np.ptp(together, axis=0).max() > 1e-2


def test_label_score_and_probabilities(model):
  answers, logits = model.answers(TEXTS[:9]), model.logits(TEXTS[:9])
  for answer, row in zip(answers, logits, strict=True):
    assert answer.label == ("negative", "positive")[row.argmax()]
    assert answer.score == max(answer.probabilities)
    chance = 1 / (1 + np.exp(row[0] - row[1]))
    np.testing.assert_allclose(answer.probabilities[1], chance, atol=1e-6)


def test_regression_gives_the_value(random_adapter):
  model = predictor(random_adapter(task="stsb"))
  answers = model.answers(TEXTS[:3], TEXTS[3:6])
  values = model.logits(TEXTS[:3], TEXTS[3:6])[:, 0]
  assert [a.score for a in answers] == values.tolist()
  assert {(a.label, a.probabilities) for a in answers} == {("", ())}


@pytest.mark.parametrize("length, cut", [(None, 1), (8, 2), (999, 0)])
def test_long_texts_are_cut_and_counted(length, cut, random_adapter):
  # 16 tokens in training, 20 positions in the model
  model = predictor(random_adapter(task="sst2"), max_length=length)
  texts = [" ".join(["word1"] * n) for n in (3, 9, 16)]
  assert np.isfinite(model.logits(texts)).all()
  assert model.truncated == cut


def test_a_tokenizer_of_another_model_is_refused(random_adapter):
  model = predictor(random_adapter(task="sst2"))
  model.tokenizer.add_tokens(["newword"])
  with pytest.raises(UserError, match="gave the id 30"):
    model.logits(["newword"])


@pytest.mark.parametrize("length", [0, -5, 1, 2])
def test_a_length_without_room_for_a_word_is_refused(length, random_adapter):
  model = predictor(random_adapter(task="sst2"), max_length=length)
  with pytest.raises(UserError, match=f"max_length is {length}.* give 3 or"):
    model.logits(["word1"])
  with pytest.raises(UserError, match="give 4 or more"):
    model.logits(["word1"], ["word2"])


def test_no_texts_have_no_answers(model):
  assert model.logits([]).shape == (0, 2) and model.answers([], []) == []


def test_what_is_no_list_of_texts_is_refused(model):
  """A text alone was answered letter by letter."""
  with pytest.raises(UserError, match="also for one text.* was a str"):
    model.answers("word1")
  with pytest.raises(UserError, match="was a str"):
    model.answers(["word1"] * 5, "word2")
  with pytest.raises(UserError, match="2 first texts and 1 second ones"):
    model.logits(["word1", "word2"], ["word3"])
  with pytest.raises(UserError, match="Text 1 is None, a NoneType"):
    check_texts(["word1", None])
  with pytest.raises(UserError, match="was a generator"):
    check_texts(text for text in ["word1"])


def test_answers_that_are_no_numbers_are_refused(random_adapter):
  classifier = restore_adapter(load_adapter(random_adapter(task="sst2")))
  bias = classifier.params["classifier"]["bias"]
  classifier.params["classifier"]["bias"] = jnp.full_like(bias, jnp.nan)
  with pytest.raises(UserError, match="not a finite number for 2 of 2 texts"):
    Predictor(classifier).answers(["word1", "word2"])
