"""Sampling in which every row has settings of its own, as data.

`sampling.py` compiles a program for each rule; here one program serves all, so
that a row may come with any rule and nothing is compiled. A row draws what it
would draw there with the same rule, key and logits. What no row asks for (a
draw, a sort, repeated n-grams, probabilities) is not computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from vera_jax.generate.history import repeats
from vera_jax.generate.sampling import Sampling, are_numbers

TOP = 20  # alternatives of each word that can be asked for, at most
OfRows = Int[Array | np.ndarray, " rows"]


class RowRules(NamedTuple):
  """How each row's next word is chosen, and whether with its probability.

  Attributes:
    temperature, top_k, top_p, no_repeat_ngram: as in `Sampling`, of each row.
    keys: the data of each row's key, the same for all words of an answer.
    step: the number of each row's next word, from 0.
    logprobs: whether the word's probability is wanted.
  """

  temperature: Float[Array | np.ndarray, " rows"]
  top_k: OfRows
  top_p: Float[Array | np.ndarray, " rows"]
  no_repeat_ngram: OfRows
  keys: Array | np.ndarray
  step: OfRows
  logprobs: Bool[Array | np.ndarray, " rows"]

  def set(
    self, row: int, how: Sampling, key: Sequence[int], *, logprobs: bool
  ) -> None:
    """Puts an answer's settings into a row of numpy's arrays."""
    values = (*how, key, 0, logprobs)
    for column, value in zip(self, values, strict=True):
      column[row] = value


class NextWords(NamedTuple):
  """The words that were chosen, and their probabilities.

  Attributes:
    ids: of the words.
    finite: whether the logits were numbers; a word means nothing else.
    logprobs: log probabilities by the model itself, whatever the rule.
    top, top_logprobs: the likeliest words, falling, and theirs.
  """

  ids: Int[Array, " rows"]
  finite: Bool[Array, " rows"]
  logprobs: Float[Array, " rows"]
  top: Int[Array, "rows top"]
  top_logprobs: Float[Array, "rows top"]


def no_rules(rows: int) -> RowRules:
  """The likeliest word in every row, as numpy's arrays to be written to."""
  whole, real = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
  key = jax.random.key_data(jax.random.key(0))
  return RowRules(
    temperature=real,
    top_k=whole,
    top_p=real + 1,
    no_repeat_ngram=whole.copy(),
    keys=np.zeros((rows, *key.shape), key.dtype),
    step=whole.copy(),
    logprobs=np.zeros(rows, bool),
  )


@jax.jit
def next_words(
  logits: Float[Array, "rows vocab"],
  history: Int[Array, "rows total"],
  lengths: Int[Array, " rows"],
  rules: RowRules,
) -> NextWords:
  """Each row's next word by its own rule.

  Args:
    logits: of the words that may come next.
    history: prompt and answer of each row so far.
    lengths: how many tokens these have.
    rules: of each row.
  """
  logits = logits.astype(jnp.float32)
  vocab = logits.shape[1]
  sizes = rules.no_repeat_ngram
  allowed = jax.lax.cond(
    jnp.any(sizes > 0),
    lambda: jnp.where(
      repeats(history, lengths, size=sizes, vocab=vocab), -jnp.inf, logits
    ),
    lambda: logits,
  )
  likeliest = jnp.argmax(allowed, axis=1).astype(jnp.int32)

  def drawn() -> Int[Array, " rows"]:
    warm = rules.temperature > 0
    scaled = allowed / jnp.where(warm, rules.temperature, 1)[:, None]
    filtered = jax.lax.cond(
      jnp.any((rules.top_k > 0) | (rules.top_p < 1)),
      lambda: _filtered(scaled, rules.top_k, rules.top_p),
      lambda: scaled,
    )
    keys = jax.random.wrap_key_data(jnp.asarray(rules.keys))
    keys = jax.vmap(jax.random.fold_in)(keys, rules.step)
    words = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(warm, words.astype(jnp.int32), likeliest)

  warmest = jnp.max(rules.temperature)
  ids = jax.lax.cond(warmest > 0, drawn, lambda: likeliest)
  count = min(TOP, vocab)

  def computed() -> tuple[Array, Array, Array]:
    chances = jax.nn.log_softmax(logits)
    values, words = jax.lax.top_k(chances, count)
    chosen = jnp.take_along_axis(chances, ids[:, None], axis=1)[:, 0]
    return chosen, words, values

  def left_out() -> tuple[Array, Array, Array]:
    none = jnp.zeros((len(logits), count))
    return none[:, 0], none.astype(jnp.int32), none

  asked = jax.lax.cond(jnp.any(rules.logprobs), computed, left_out)
  return NextWords(ids, are_numbers(logits), *asked)


def _filtered(
  logits: Float[Array, "rows vocab"],
  top_k: OfRows,
  top_p: Float[Array | np.ndarray, " rows"],
) -> Float[Array, "rows vocab"]:
  """As `sampling.filtered`, after the temperature."""
  vocab = logits.shape[1]
  falling = jnp.flip(jnp.sort(logits, axis=1), axis=1)
  count = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
  least = jnp.take_along_axis(falling, count[:, None] - 1, axis=1)
  falling = jnp.where(falling < least, -jnp.inf, falling)
  chances = jax.nn.softmax(falling, axis=1)
  likelier = jnp.cumsum(chances, axis=1) - chances
  # rounding must not cut a row that asks for all words
  kept = (likelier < top_p[:, None]) | (top_p >= 1)[:, None]
  kept = kept.at[:, 0].set(True)
  nucleus = jnp.min(jnp.where(kept, falling, jnp.inf), axis=1, keepdims=True)
  return jnp.where(logits < jnp.maximum(least, nucleus), -jnp.inf, logits)
