"""Beam search by both sets of rules, on tables of logits."""

import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.generate.markov import EOS, WORDS, random_table, search
from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.generate.beam import Beam, best_words

GOLDEN = json.loads(
  (Path(__file__).parents[1] / "golden/beams.json").read_text()
)
PROMPTS = [[5], [7, 3, 7, 3], [4, 4, 9]]


@pytest.mark.parametrize(
  "case", rest_is_slow(GOLDEN["cases"], quick=3), ids=lambda c: str(c["seed"])
)
def test_the_rules_hf_give_transformers_texts(case):
  check_against_transformers(case)


def check_against_transformers(case):
  case = dict(case)
  expected, eos = case.pop("answers"), case.pop("eos")
  table = random_table(case.pop("seed"))
  found = search(table, GOLDEN["prompts"], new=GOLDEN["new"], eos=eos, **case)
  for texts, answers in zip(found, expected, strict=True):
    assert [text for text, _ in texts] == [text for text, _ in answers]
    scores = [score for _, score in answers]
    assert [score for _, score in texts] == pytest.approx(scores, rel=1e-5)


@pytest.mark.parity
def test_the_rules_hf_give_transformers_texts_live():
  make = pytest.importorskip("tests.golden.make_beams", exc_type=ImportError)
  for case in make.cases():
    expected = [make.answers(case, prompt) for prompt in make.PROMPTS]
    check_against_transformers({**case, "answers": expected})


def lora_by_hand(table, prompt, *, beams, penalty, ngram, new, eos):
  """microsoft/LoRA's search with lists, one candidate after another."""
  best, best_score = [], -np.inf
  running = [(0.0, [])]
  for _ in range(new):
    candidates = []
    for total, text in running:
      before = [0, *prompt, *text]
      logits = table[before[-2], before[-1]].astype(np.float64)
      if ngram:
        grams = zip(*(text[k:] for k in range(ngram)), strict=False)
        for *head, word in grams:
          if head == text[len(text) - ngram + 1 :]:
            logits[word] = -np.inf
      for word, chance in enumerate(log_softmax(logits)):
        candidates.append((total + chance, [*text, word]))
    candidates.sort(key=lambda pair: -pair[0])
    running = []
    for total, text in candidates[:beams]:
      if text[-1] not in eos:
        running.append((total, text))
      elif total / len(text) ** penalty > best_score:
        best, best_score = text, total / len(text) ** penalty
  for total, text in running:
    if total / new**penalty > best_score:
      best, best_score = text, total / new**penalty
  return best, best_score


@pytest.mark.parametrize(
  "penalty, ngram, beams", rest_is_slow([(0.8, 3, 3), (-0.5, 1, 4)])
)
def test_the_rules_lora_are_microsofts(penalty, ngram, beams):
  for seed in range(8):
    table = random_table(seed, spread=2.5)
    found = search(
      table,
      PROMPTS,
      rules="lora",
      beams=beams,
      length_penalty=penalty,
      no_repeat_ngram=ngram,
    )
    for prompt, [(text, score)] in zip(PROMPTS, found, strict=True):
      expected, best = lora_by_hand(
        table, prompt, beams=beams, penalty=penalty, ngram=ngram, new=8, eos=EOS
      )
      assert text == expected
      assert score == pytest.approx(best, rel=1e-5)


def every_text(table, prompt, *, new, eos, penalty):
  """All texts with their scores, the best first."""
  texts, running = [], [([], 0.0)]
  for length in range(1, new + 1):
    longer = []
    for text, total in running:
      before = [0, *prompt, *text]
      for word, chance in enumerate(log_softmax(table[before[-2], before[-1]])):
        pair = [*text, word], total + float(chance)
        ended = word in eos or length == new
        if ended:
          texts.append((pair[0], pair[1] / length**penalty))
        else:
          longer.append(pair)
    running = longer
  return sorted(texts, key=lambda pair: -pair[1])


@pytest.mark.parametrize("rules", ["hf", "lora"])
def test_with_beams_for_every_text_the_best_of_all_is_found(rules):
  for seed in range(4):
    table = random_table(seed, words=4)
    settings = {"early_stopping": "never"} if rules == "hf" else {}
    found = search(
      table, [[3], [2, 1]], rules=rules, beams=30, new=4, eos=[0], **settings
    )
    for prompt, texts in zip([[3], [2, 1]], found, strict=True):
      expected = every_text(table, prompt, new=4, eos=[0], penalty=1.0)
      assert texts[0][0] == expected[0][0]
      assert texts[0][1] == pytest.approx(expected[0][1], rel=1e-5)


def test_the_best_words_of_all_beams():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 40, (3, 4, 9)).astype(np.float32)  # with equal ones
  for keep in (4, 12):
    values, beams, words = best_words(jnp.asarray(scores), keep=keep)
    flat = scores.reshape(3, -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :keep]
    assert (values == np.take_along_axis(flat, order, axis=1)).all()
    assert (beams == order // 9).all() and (words == order % 9).all()


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"rules": "t5x"}, "choose hf or lora"),
    ({"beams": 0}, "at least 1"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
    ({"length_penalty": float("nan")}, "finite"),
    ({"early_stopping": "soon"}, "'never'"),
    ({"rules": "lora", "early_stopping": True}, "no effect"),
  ],
)
def test_settings_that_there_are_not(settings, words):
  with pytest.raises(UserError, match=words):
    Beam(**settings).check()


def test_more_ends_than_words():
  table = random_table(0, words=4)
  with pytest.raises(UserError, match="name fewer ids"):
    search(table, [[1]], eos=list(itertools.chain(range(4))))


def test_the_golden_cases_cover_what_ends_a_search():
  cases = GOLDEN["cases"]
  assert {str(case["early_stopping"]) for case in cases} == {
    "False",
    "True",
    "never",
  }
  lengths = {
    len(text) for case in cases for a in case["answers"] for text, _ in a
  }
  assert max(lengths) == GOLDEN["new"] and min(lengths) == 1
  assert all(WORDS > word for case in cases for word in case["eos"])


@pytest.mark.parametrize("rules", ["hf", "lora"])
def test_logits_that_are_no_numbers_are_named_by_row(rules):
  settings = {"rules": rules, "beams": 3}
  table = random_table(0)
  # the prompt's logits, or only those of the second step
  for prompt in ([5], [5, 6]):
    for bad in (np.nan, np.inf):
      harmed = table.copy()
      harmed[0, 5] = np.where(np.arange(WORDS) == 6, 30.0, harmed[0, 5])
      harmed[5, 6, 3] = bad
      found = search(harmed, [prompt, [9]], finite=(False, True), **settings)
      assert found[1] == search(table, [[3], [9]], **settings)[1]
