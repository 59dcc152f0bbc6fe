"""Greedy decoding and sampling: one word after another, in one compiled loop.

Every row has a key of its own, from which step i draws with `fold_in(key, i)`:
what a row samples depends on its key and its logits, not on its neighbours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from vera_jax.errors import UserError
from vera_jax.generate.history import append, repeats

TokensToLogits = Callable[[Array, Any], tuple[Array, Any]]


class Sampling(NamedTuple):
  """How a word is chosen from its logits, in the order of transformers.

  Attributes:
    temperature: the logits are divided by it; 0 takes the likeliest word.
    top_k: only the k likeliest words are drawn from; 0 for all.
    top_p: only the likeliest words that together have this probability, and
      never none; 1 for all.
    no_repeat_ngram: no n-gram of this size comes twice in prompt and answer; 0
      for no such rule. It is applied first.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  no_repeat_ngram: int = 0

  def check(self) -> None:
    """Raises a UserError for settings that choose nothing."""
    if not (self.temperature >= 0 and math.isfinite(self.temperature)):
      raise UserError(
        f"temperature is {self.temperature}; it is 0, for the likeliest word"
        " each time, or more, usually up to 1."
      )
    if self.top_k < 0:
      raise UserError(
        f"top_k is {self.top_k}; it is a number of words, or 0 for all."
      )
    if not 0 < self.top_p <= 1:
      raise UserError(
        f"top_p is {self.top_p}; it is a probability above 0, 1 for all words."
      )
    if self.no_repeat_ngram < 0:
      raise UserError(
        f"no_repeat_ngram is {self.no_repeat_ngram}; it is a number of tokens,"
        " or 0 for no such rule."
      )
    if not self.temperature and (self.top_k or self.top_p < 1):
      raise UserError(
        "top_k and top_p choose among drawn words, and at temperature 0 none"
        " are drawn: give a temperature, such as 0.7."
      )


GREEDY = Sampling()


class Sampled(NamedTuple):
  """The words that were sampled behind each prompt.

  Attributes:
    ids: the new tokens, with `pad` behind each row's last one.
    lengths: how many they are, with an end-of-text token among them.
    finite: whether the logits of all these were numbers; a row ends where they
      are not, and what it says then means nothing.
  """

  ids: Int[Array, "rows new"]
  lengths: Int[Array, " rows"]
  finite: Bool[Array, " rows"]


def are_numbers(logits: Float[Array, "*rows vocab"]) -> Bool[Array, "*rows"]:
  """Whether words can be drawn by each row's logits.

  A word that can't come may have minus infinity; the highest logit is NaN if
  any of them is, and infinite if one of them is or all are minus that.
  """
  return jnp.isfinite(logits.max(axis=-1))


def filtered(
  logits: Float[Array, "rows vocab"], *, sampling: Sampling
) -> Float[Array, "rows vocab"]:
  """The logits at a temperature above 0, -inf for words that are left out."""
  logits = logits / sampling.temperature
  vocab = logits.shape[1]
  if 0 < sampling.top_k < vocab:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    # top_k words at most are not -inf, unless several are equal to the last
    falling = jnp.flip(jnp.sort(logits, axis=1), axis=1)
    chances = jax.nn.softmax(falling, axis=1)
    likelier = jnp.cumsum(chances, axis=1) - chances
    kept = (likelier < sampling.top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def draw(
  logits: Float[Array, "rows vocab"],
  keys: Key[Array, " rows"],
  *,
  sampling: Sampling,
) -> Int[Array, " rows"]:
  """The next word of each row: the likeliest one, or one drawn by its key."""
  if not sampling.temperature:
    return jnp.argmax(logits, axis=1).astype(jnp.int32)
  logits = filtered(logits, sampling=sampling)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def next_tokens(
  logits: Float[Array, "rows vocab"],
  keys: Key[Array, " rows"],
  step: Int[Array, ""],
  history: Int[Array, "rows total"],
  lengths: Int[Array, " rows"],
  *,
  sampling: Sampling,
) -> Int[Array, " rows"]:
  """The word number `step` of each answer.

  Args:
    logits: those of the words that may come next.
    keys: one for each row, the same in every step.
    step: from 0.
    history: prompt and answer so far, of `lengths` tokens.
    lengths: how many tokens each row of `history` has.
    sampling: the rule that the words are chosen by.
  """
  if sampling.no_repeat_ngram:
    forbidden = repeats(
      history, lengths, size=sampling.no_repeat_ngram, vocab=logits.shape[1]
    )
    logits = jnp.where(forbidden, -jnp.inf, logits)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
  return draw(logits, keys, sampling=sampling)


compiled_next = jax.jit(next_tokens, static_argnames="sampling")


def sample(
  tokens_to_logits: TokensToLogits,
  logits: Float[Array, "rows vocab"],
  state: Any,
  prompts: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  keys: Key[Array, " rows"],
  *,
  sampling: Sampling,
  eos: Sequence[int],
  max_new_tokens: int,
  pad: int = 0,
) -> Sampled:
  """Answers to prompts of different lengths, all in one loop.

  It ends when every row has ended, or after `max_new_tokens`.

  Args:
    tokens_to_logits: reads one more token of each row (see the package).
    logits: those of the first new word of each row.
    state: as `tokens_to_logits` takes it, after the prompts.
    prompts: padded on the right.
    lengths: the number of tokens of each prompt.
    keys: one for each row.
    sampling: the rule by which words are drawn.
    eos: the ids that end a text. Without any only the maximum ends it.
    max_new_tokens: the most tokens of an answer.
    pad: what stands behind an answer's end.
  """
  rows = prompts.shape[0]
  ends = jnp.asarray(tuple(eos), jnp.int32)

  class Carry(NamedTuple):
    step: Array
    ids: Array
    history: Array
    done: Array
    written: Array
    finite: Array
    state: Any

  def write(carry: Carry, logits: Array) -> Carry:
    so_far = lengths + carry.step
    token = next_tokens(
      logits, keys, carry.step, carry.history, so_far, sampling=sampling
    )
    token = jnp.where(carry.done, pad, token)
    finite = carry.finite & (carry.done | are_numbers(logits))
    return Carry(
      carry.step + 1,
      carry.ids.at[:, carry.step].set(token),
      carry.history.at[jnp.arange(rows), so_far].set(token),
      carry.done | jnp.isin(token, ends) | ~finite,
      carry.written + ~carry.done,
      finite,
      carry.state,
    )

  def unfinished(carry: Carry) -> Bool[Array, ""]:
    return (carry.step < max_new_tokens) & ~jnp.all(carry.done)

  def go_on(carry: Carry) -> Carry:
    last = jax.lax.dynamic_slice_in_dim(carry.ids, carry.step - 1, 1, axis=1)
    logits, state = tokens_to_logits(last, carry.state)
    return write(carry._replace(state=state), logits)

  ids = jnp.full((rows, max_new_tokens), pad, jnp.int32)
  none = jnp.zeros(rows, jnp.int32)
  history = append(prompts, lengths, ids)
  first = Carry(jnp.int32(0), ids, history, none > 0, none, none == 0, state)
  last = jax.lax.while_loop(unfinished, go_on, write(first, logits))
  return Sampled(last.ids, last.written, last.finite)
