"""The tokens of each row so far, and the words that they forbid."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


def append(
  prompts: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  answers: Int[Array, "rows new"],
) -> Int[Array, "rows total"]:
  """Each row's answer right behind its prompt, with no gap; total = length +
  new.

  Args:
    prompts: padded on the right.
    lengths: the number of tokens of each prompt.
    answers: the tokens that follow.
  """
  rows, new = answers.shape
  tokens = jnp.pad(prompts, ((0, 0), (0, new)))
  columns = lengths[:, None] + jnp.arange(new)[None]
  return tokens.at[jnp.arange(rows)[:, None], columns].set(answers)


def repeats(
  tokens: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  *,
  size: int,
  vocab: int,
) -> Bool[Array, "rows words"]:
  """The words that would complete an n-gram which the row already has.

  Args:
    tokens: each row's tokens so far; behind its length they count for nothing.
    lengths: the number of tokens of each row.
    size: the length of the n-grams, 1 or more. 1 forbids every word that was
      there.
    vocab: the number of words.
  """
  rows, length = tokens.shape
  windows = length - size + 1
  if windows < 1:
    return jnp.zeros((rows, vocab), bool)
  # a window forbids its last word if the others are the row's last ones
  same = jnp.arange(size - 1, length)[None] < lengths[:, None]
  for k in range(size - 1):
    column = jnp.maximum(lengths - (size - 1) + k, 0)[:, None]
    last = jnp.take_along_axis(tokens, column, axis=1)
    same &= tokens[:, k : k + windows] == last
  forbidden = jnp.where(same, tokens[:, size - 1 :], vocab)
  none = jnp.zeros((rows, vocab), bool)
  rows_of = jnp.arange(rows)[:, None]
  return none.at[rows_of, forbidden].set(True, mode="drop")
