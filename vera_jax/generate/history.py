"""The tokens of each row so far, and the words that they forbid."""

import jax
import jax.numpy as jnp
import numpy as np
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
  size: int | Int[Array | np.ndarray, " rows"],
  vocab: int,
) -> Bool[Array, "rows words"]:
  """The words that would complete an n-gram which the row already has.

  Args:
    tokens: each row's tokens so far; behind its length they count for nothing.
    lengths: the number of tokens of each row.
    size: the length of the n-grams, of all rows or of each. 1 forbids every
      word that was there, 0 none.
    vocab: the number of words.
  """
  sizes = jnp.broadcast_to(size, lengths.shape)[:, None]
  columns = jnp.arange(tokens.shape[1])[None]

  def match(back: Array, same: Array) -> Array:
    """Whether also the token so far back is the row's own so far back."""
    before = jnp.roll(tokens, back, axis=1)
    place = jnp.maximum(lengths - back, 0)[:, None]
    equal = before == jnp.take_along_axis(tokens, place, axis=1)
    return same & (equal & (columns >= back) | (back >= sizes))

  # a word is forbidden if those before it are the row's last ones
  same = (columns < lengths[:, None]) & (sizes > 0)
  same = jax.lax.fori_loop(1, jnp.max(sizes), match, same)
  forbidden = jnp.where(same, tokens, vocab)
  none = jnp.zeros((len(tokens), vocab), bool)
  rows = jnp.arange(len(tokens))[:, None]
  return none.at[rows, forbidden].set(True, mode="drop")
