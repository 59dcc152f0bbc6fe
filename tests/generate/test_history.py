"""The n-grams that may not come again."""

import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.generate.history import append, repeats


@pytest.mark.parametrize("size", [1, 3])
def test_the_words_that_would_repeat_an_n_gram(size):
  rng = np.random.default_rng(size)
  tokens = rng.integers(0, 3, (20, 12)).astype(np.int32)
  lengths = rng.integers(0, 13, 20).astype(np.int32)
  found = repeats(jnp.asarray(tokens), jnp.asarray(lengths), size=size, vocab=5)
  assert found.shape == (20, 5)
  for row, length, words in zip(tokens, lengths, found, strict=True):
    text = row[:length].tolist()
    grams = {tuple(text[i : i + size]) for i in range(length - size + 1)}
    start = text[length - size + 1 :] if size > 1 else []
    full = length >= size - 1
    expected = [full and (*start, word) in grams for word in range(5)]
    assert words.tolist() == expected
  assert found.any() and not found.all()


def test_each_row_may_have_a_size_of_its_own():
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 3, (20, 12)), jnp.int32)
  lengths = jnp.asarray(rng.integers(0, 13, 20), jnp.int32)
  sizes = jnp.arange(20) % 4
  found = repeats(tokens, lengths, size=sizes, vocab=5)
  assert not found[::4].any()  # 0 forbids nothing
  for size in (1, 2, 3):
    own = repeats(tokens, lengths, size=size, vocab=5)
    np.testing.assert_array_equal(found[size::4], own[size::4])


def test_rows_shorter_than_the_n_gram_forbid_nothing():
  tokens = jnp.zeros((2, 3), jnp.int32)
  assert not repeats(tokens, jnp.array([3, 3]), size=4, vocab=2).any()


def test_answers_follow_their_prompts_without_a_gap():
  whole = append(
    jnp.array([[1, 2, 3], [4, 0, 0]]),
    jnp.array([3, 1]),
    jnp.array([[7, 8], [9, 6]]),
  )
  assert whole.tolist() == [[1, 2, 3, 7, 8], [4, 9, 6, 0, 0]]
