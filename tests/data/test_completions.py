"""Sequences of texts, prompts and completions, and what of them is learned."""

import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from tests.tasks.decoder_files import tokenizer_of_words
from vera_jax.data.completions import (
  Completions,
  encode_completions,
  end_of_text,
  prompt_ids,
)
from vera_jax.data.examples import Examples, take
from vera_jax.data.tokens import tokenise
from vera_jax.errors import UserError

END, BEGIN, W0 = 0, 1, 3
RIGHT, LEFT = Completions("right"), Completions("left")
TEXTS = Examples(["word0 word1 word2", "word4"], None, None, np.arange(2))
PAIRS = dataclasses.replace(TEXTS, second=["word5 word6", "word7"])


def with_begin():
  """As Llama's: <begin> stands before every text."""
  tokenizer = tokenizer_of_words(bos_token="<begin>")
  tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
    single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
  )
  return tokenizer


def sequences(examples, tokenizer, how, max_length=20):
  """[(id, whether it is learned), ...] of each example."""
  found = encode_completions(examples, tokenizer, max_length, how)
  pairs = list(
    zip(found["ids"].tolist(), found["learned"].tolist(), strict=True)
  )
  bounds = found["offsets"]
  parts = [pairs[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
  return parts, int(found["truncated"])


def marked(ids, first):
  """Learned from the place `first` on."""
  return [(i, place >= first) for place, i in enumerate(ids)]


def test_texts_and_completions_end_with_the_end_of_text():
  plain, begun = tokenizer_of_words(), with_begin()
  assert sequences(TEXTS, plain, RIGHT) == (
    [marked([3, 4, 5, END], 1), marked([7, END], 1)],
    0,
  )
  assert sequences(TEXTS, begun, RIGHT)[0] == [
    marked([BEGIN, 3, 4, 5, END], 1),
    marked([BEGIN, 7, END], 1),
  ]
  assert sequences(PAIRS, begun, RIGHT)[0] == [
    marked([BEGIN, 3, 4, 5, 8, 9, END], 4),
    marked([BEGIN, 7, 10, END], 2),
  ]
  apart = Completions("right", separate=True)
  assert sequences(PAIRS, plain, apart)[0] == [
    marked([3, 4, 5, END, 8, 9, END], 4),
    marked([7, END, 10, END], 2),
  ]


@pytest.mark.parametrize("separate", [False, True])
def test_a_prompt_has_the_tokens_of_training(separate):
  how = Completions("left", separate)
  for tokenizer in (tokenizer_of_words(), with_begin()):
    trained, _ = sequences(PAIRS, tokenizer, how)
    asked = prompt_ids(tokenizer, PAIRS.first, how=how)
    for ids, pairs in zip(asked, trained, strict=True):
      assert ids == [i for i, is_learned in pairs if not is_learned]


def test_the_side_that_is_named_is_cut():
  begun = with_begin()
  cut, number = sequences(PAIRS, begun, RIGHT, 6)
  assert number == 1 and cut[0] == marked([BEGIN, 3, 4, 5, 8, 9], 4)
  cut, number = sequences(PAIRS, begun, LEFT, 6)
  assert number == 1 and cut[0] == marked([BEGIN, 4, 5, 8, 9, END], 3)
  # of a completion that fills it all, the first token has nothing before it
  cut, _ = sequences(PAIRS, tokenizer_of_words(), LEFT, 3)
  assert cut[0] == marked([8, 9, END], 1)


def test_what_can_not_be_learned_is_refused():
  plain = tokenizer_of_words()
  moved = take(PAIRS, np.array([1, 0]))  # the long one is the second of them
  with pytest.raises(UserError, match="Of 1 examples, the first of them row 1"):
    sequences(moved, plain, RIGHT, 3)
  with pytest.raises(UserError, match="cut is 'middle'; choose left or right"):
    sequences(PAIRS, plain, Completions("middle"))
  with pytest.raises(UserError, match="is 2; at least 3 tokens"):
    sequences(PAIRS, with_begin(), RIGHT, 2)
  plain.eos_token = None
  with pytest.raises(UserError, match="no end-of-text token"):
    end_of_text(plain)


def test_other_settings_make_other_tokens(tmp_path):
  tokenizer = tokenizer_of_words(pad_token="<end>")
  settings = (LEFT, LEFT, RIGHT, Completions("left", separate=True))
  made = [
    tokenise(PAIRS, tokenizer, 20, tmp_path, completions=how)
    for how in settings
  ]
  np.testing.assert_array_equal(made[0].learned, made[1].learned)
  assert len({tokens.fingerprint for tokens in made}) == 3
