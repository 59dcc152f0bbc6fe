"""Greedy decoding and sampling, on tables of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.generate.markov import EOS, chain, random_table, sampled
from vera_jax.errors import UserError
from vera_jax.generate.sampling import Sampling, draw, filtered

PROMPTS = [[5], [7, 3, 7, 3], [4, 4, 9], [2, 2]]
KEYS = jax.random.split(jax.random.key(0), len(PROMPTS))


def greedy(table, prompt, *, new=8, ngram=0):
  text = [0, *prompt]
  for _ in range(new):
    logits = table[text[-2], text[-1]].copy()
    so_far = text[1:]
    for *head, word in zip(*(so_far[k:] for k in range(ngram)), strict=False):
      if head == so_far[len(so_far) - ngram + 1 :]:
        logits[word] = -np.inf
    text.append(int(logits.argmax()))
    if text[-1] in EOS:
      break
  return text[1 + len(prompt) :]


@pytest.mark.parametrize("ngram", [0, 2])
def test_greedy_takes_the_likeliest_word_until_an_end(ngram):
  settings = Sampling(no_repeat_ngram=ngram)
  lengths = set()
  for seed in range(6):
    table = random_table(seed)
    found = sampled(table, PROMPTS, KEYS, settings)
    expected = [greedy(table, prompt, ngram=ngram) for prompt in PROMPTS]
    assert found == expected
    lengths |= {len(text) for text in found}
  assert 8 in lengths and len(lengths) > 2  # some ended, some did not


def test_without_ends_every_answer_is_of_the_maximal_length():
  found = sampled(random_table(0), PROMPTS, KEYS, Sampling(), eos=())
  assert [len(text) for text in found] == [8] * 4


def test_a_row_does_not_depend_on_its_neighbours():
  table, settings = random_table(1, spread=0.5), Sampling(temperature=1.0)
  together = sampled(table, PROMPTS, KEYS, settings, eos=())
  order = np.array([2, 0, 3, 1])
  mixed = sampled(
    table, [PROMPTS[i] for i in order], KEYS[order], settings, eos=()
  )
  assert mixed == [together[i] for i in order]
  assert len({tuple(text) for text in together}) == 4
  # the same prompt with the same key: other neighbours, and the same answer
  others = [[1], PROMPTS[1], [8, 8, 8], [6]]
  again = sampled(table, others, KEYS, settings, eos=())
  assert again[1] == together[1] and again[0] != together[0]


def test_words_are_drawn_with_their_chances():
  logits = np.random.default_rng(0).standard_normal(6).astype(np.float32)
  settings = Sampling(temperature=0.7, top_k=4, top_p=0.9)
  many = jnp.broadcast_to(jnp.asarray(logits), (4000, 6))
  keys = jax.random.split(jax.random.key(1), 4000)
  drawn = np.bincount(draw(many, keys, sampling=settings), minlength=6)
  kept = filtered(jnp.asarray(logits)[None], sampling=settings)[0]
  expected = softmax(np.asarray(kept))
  assert 1 < (expected > 0).sum() < 5
  assert (drawn[expected == 0] == 0).all()
  np.testing.assert_allclose(drawn / 4000, expected, atol=0.03)


def test_what_top_k_and_top_p_leave():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

  def left(**settings):
    found = filtered(logits, sampling=Sampling(temperature=1.0, **settings))
    return np.flatnonzero(np.isfinite(found[0])).tolist()

  assert left() == [0, 1, 2, 3]
  assert left(top_k=2) == [1, 3] and left(top_k=9) == [0, 1, 2, 3]
  assert left(top_p=0.3) == [1]  # the likeliest word is always left
  assert left(top_p=0.5) == [1, 3] and left(top_p=0.95) == [0, 1, 2, 3]
  # top_p is a share of what top_k leaves: 4/7, 3/7
  assert left(top_k=2, top_p=0.55) == [1]


@pytest.mark.parity
@pytest.mark.parametrize(
  "settings", [(0.7, 0, 0.6), (1.5, 7, 1.0), (1, 9, 0.8)]
)
def test_transformers_leaves_the_same_words(settings):
  torch = pytest.importorskip("torch")
  from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
  )

  temperature, top_k, top_p = settings
  logits = np.random.default_rng(2).standard_normal((50, 30))
  logits = logits.astype(np.float32) * 2
  theirs = TemperatureLogitsWarper(float(temperature))(
    None, torch.from_numpy(logits)
  )
  if top_k:
    theirs = TopKLogitsWarper(top_k)(None, theirs)
  if top_p < 1:
    theirs = TopPLogitsWarper(top_p)(None, theirs)
  ours = filtered(jnp.asarray(logits), sampling=Sampling(*settings))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_an_end_comes_once_and_counts():
  table = chain({2: {3: 1.0}, 3: {1: 1.0}, 1: {3: 1.0}}, words=4)
  assert sampled(table, [[2]], KEYS[:1], Sampling()) == [[3, 1]]


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"temperature": -1.0}, "temperature is -1"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0"),
    ({"no_repeat_ngram": -2}, "no_repeat_ngram is -2"),
    ({"top_k": 5}, "give a temperature"),
  ],
)
def test_settings_that_choose_nothing(settings, words):
  with pytest.raises(UserError, match=words):
    Sampling(**settings).check()


def test_logits_that_are_no_numbers_are_named_by_row():
  table = random_table(0)
  expected = sampled(table, PROMPTS, KEYS, Sampling())
  for bad in (np.nan, np.inf):
    harmed = table.copy()
    harmed[0, 5, 3] = bad  # what follows the first prompt
    finite = (False, True, True, True)
    found = sampled(harmed, PROMPTS, KEYS, Sampling(), finite=finite)
    assert found[1:] == expected[1:] and len(found[0]) == 1
