"""Beam search by two sets of rules, in one compiled loop.

`rules="hf"` gives what `transformers.generate(num_beams=...)` gives (5.24), and
`rules="lora"` what microsoft/LoRA's `examples/NLG/src/gpt2_beam.py` gives, by
which the numbers of the LoRA and VeRA papers on E2E were made. They differ:

- n-grams that may not come again: hf counts those of prompt and answer, lora
  those of the answer.
- Forbidden words: hf strikes them out after the softmax; lora before it, so
  that the probabilities of the others add up to 1.
- Candidates of a step: in hf 1 + the number of end tokens, at least 2, for each
  beam; in lora as many as beams.
- A text that ends: in hf its beam goes to the next candidate; in lora the beam
  is empty for a step.
- The search keeps as many finished texts as beams in hf, and ends by
  `early_stopping`; in lora it keeps the best one and runs all steps.
- A text that hasn't ended by then competes with those that have; in hf if its
  last word is one of the step's best.

A finished text's score is the sum of its log probabilities, divided by its
length in new tokens, the end token included, to the power `length_penalty`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from vera_jax.errors import UserError
from vera_jax.generate.history import append, repeats
from vera_jax.generate.sampling import are_numbers

# (last words [rows, beams], the beams of the step before that they continue,
# state) -> (logits [rows, beams, vocab], state)
BeamsToLogits = Callable[[Array, Array, Any], tuple[Array, Any]]
RULES = ("hf", "lora")
NEVER = "never"
# What transformers has for minus infinity; -inf itself would not let a worse
# text of two be seen as worse than the other.
LOW = -1.0e9
BLOCK = 128  # scores of which the highest is found first


class Beam(NamedTuple):
  """How beam search goes.

  Attributes:
    beams: how many texts are followed at a time.
    length_penalty: the power of a text's length that divides its score; above 0
      it favours long texts.
    no_repeat_ngram: no n-gram of this size comes twice; 0 for no such rule.
    early_stopping: with the rules "hf", true ends as soon as there are as many
      finished texts as beams; false when the best beam, scored as if it ended
      here, is no better than the worst of these; "never" when it can't become
      better up to the maximal length.
    rules: "hf" or "lora".
  """

  beams: int = 4
  length_penalty: float = 1.0
  no_repeat_ngram: int = 0
  early_stopping: bool | str = False
  rules: str = "hf"

  def check(self) -> None:
    """Raises a UserError for settings that there are not."""
    if self.rules not in RULES:
      raise UserError(f"rules is {self.rules!r}; choose {' or '.join(RULES)}.")
    if self.beams < 1:
      raise UserError(f"beams is {self.beams}; at least 1 is needed.")
    if self.no_repeat_ngram < 0:
      raise UserError(
        f"no_repeat_ngram is {self.no_repeat_ngram}; it is a number of tokens,"
        " or 0 for no such rule."
      )
    if not np.isfinite(self.length_penalty):
      raise UserError(
        f"length_penalty is {self.length_penalty}; it is a finite number."
      )
    if self.early_stopping not in (True, False, NEVER):
      raise UserError(
        f"early_stopping is {self.early_stopping!r}; choose true, false or"
        f" {NEVER!r}."
      )
    if self.rules == "lora" and self.early_stopping is not False:
      raise UserError(
        "With the rules 'lora' the search always runs to the end:"
        " early_stopping has no effect, so leave it out."
      )


class Found(NamedTuple):
  """The finished texts of each prompt, the best one first.

  With the rules "lora" there is one for each prompt.

  Attributes:
    ids: the new tokens, with `pad` behind each text's last one.
    lengths: how many they are, with an end token among them; 0 where there is
      no text.
    scores: as the module says.
    finite: whether the logits of all beams were numbers; a row's search ends
      where they are not, and what it has found then means nothing.
  """

  ids: Int[Array, "rows texts new"]
  lengths: Int[Array, "rows texts"]
  scores: Float[Array, "rows texts"]
  finite: Bool[Array, " rows"]


class Search(NamedTuple):
  """The state of a search between two steps.

  Attributes:
    ids: the new tokens of the texts that are followed.
    scores: the sums of their log probabilities.
    origins: the beam of the step before that each of them continues.
    found: the finished texts.
    ended: which places of `found` are taken.
    open: the rows whose `found` may still change.
  """

  ids: Int[Array, "rows beams new"]
  scores: Float[Array, "rows beams"]
  origins: Int[Array, "rows beams"]
  found: Found
  ended: Bool[Array, "rows texts"]
  open: Bool[Array, " rows"]


def beam_search(
  tokens_to_logits: BeamsToLogits,
  logits: Float[Array, "rows vocab"],
  state: Any,
  prompts: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  *,
  beam: Beam,
  eos: Sequence[int],
  max_new_tokens: int,
  pad: int = 0,
) -> Found:
  """The best answers to prompts of different lengths, all in one loop.

  The loop ends when no row's result can change any more.

  Args:
    tokens_to_logits: reads the last word of each beam, which continues a beam
      of the step before (see the package).
    logits: of the first new word of each prompt.
    state: as `tokens_to_logits` takes it, every beam after its prompt.
    prompts: padded on the right.
    lengths: of the prompts, in tokens.
    beam: the settings.
    eos: the ids that end a text.
    max_new_tokens: the most tokens of an answer.
    pad: what stands behind an answer's end.

  Raises:
    UserError: settings that there are not, or too few words for the beams.
  """
  beam.check()
  rows, vocab = logits.shape
  beams = beam.beams
  keep = beams
  if beam.rules == "hf":
    keep *= max(2, 1 + len(eos))
  if keep > beams * vocab:
    raise UserError(
      f"{keep // beams} candidates are needed for each beam, but there are"
      f" only {vocab} words: name fewer ids that end a text."
    )
  # one table, for a power in the loop would round in another way
  steps = np.arange(1, max_new_tokens + 1, dtype=np.float64)
  penalties = jnp.asarray(steps**beam.length_penalty, jnp.float32)
  ends = jnp.asarray(tuple(eos), jnp.int32)
  before = jnp.repeat(prompts, beams, axis=0), jnp.repeat(lengths, beams)

  def forbidden(search: Search, step: Array) -> Bool[Array, "rows beams vocab"]:
    tokens = search.ids.reshape(rows * beams, max_new_tokens)
    count = jnp.full(rows * beams, step)
    if beam.rules == "hf":
      tokens, count = append(*before, tokens), before[1] + step
    words = repeats(tokens, count, size=beam.no_repeat_ngram, vocab=vocab)
    return words.reshape(rows, beams, vocab)

  def advance(search: Search, step: Array, logits: Array) -> Search:
    """One more word for each beam, from its logits."""
    logits = logits.astype(jnp.float32)
    numbers = jnp.all(are_numbers(logits), axis=1)
    if beam.no_repeat_ngram and beam.rules == "lora":
      logits = jnp.where(forbidden(search, step), -jnp.inf, logits)
    chances = jax.nn.log_softmax(logits, axis=-1)
    # where every word is forbidden there is no softmax
    chances = jnp.where(jnp.isnan(chances), -jnp.inf, chances)
    if beam.no_repeat_ngram and beam.rules == "hf":
      chances = jnp.where(forbidden(search, step), -jnp.inf, chances)
    values, origins, tokens = best_words(
      search.scores[:, :, None] + chances, keep=keep
    )
    ids = jnp.take_along_axis(search.ids, origins[:, :, None], axis=1)
    ids = ids.at[:, :, step].set(tokens)
    update = _hf if beam.rules == "hf" else _lora
    found = update(
      search,
      ids,
      values,
      origins,
      jnp.isin(tokens, ends),
      step,
      penalties,
      beam=beam,
    )
    finite = found.found.finite & (numbers | ~search.open)
    return found._replace(
      found=found.found._replace(finite=finite), open=found.open & finite
    )

  def unfinished(carry: tuple[Array, Search, Any]) -> Array:
    step, search, _ = carry
    return (step < max_new_tokens) & jnp.any(search.open)

  def go_on(carry: tuple[Array, Search, Any]) -> tuple[Array, Search, Any]:
    step, search, state = carry
    last = jax.lax.dynamic_index_in_dim(search.ids, step - 1, 2, False)
    logits, state = tokens_to_logits(last, search.origins, state)
    return step + 1, advance(search, step, logits), state

  # All beams start as the prompt: all but the first one are out of the running,
  # or the same text would be followed several times.
  texts = beams if beam.rules == "hf" else 1
  low = LOW if beam.rules == "hf" else -jnp.inf
  start = Search(
    ids=jnp.full((rows, beams, max_new_tokens), pad, jnp.int32),
    scores=jnp.full((rows, beams), low).at[:, 0].set(0.0),
    origins=jnp.zeros((rows, beams), jnp.int32),
    found=Found(
      jnp.full((rows, texts, max_new_tokens), pad, jnp.int32),
      jnp.zeros((rows, texts), jnp.int32),
      jnp.full((rows, texts), low),
      jnp.ones(rows, bool),
    ),
    ended=jnp.zeros((rows, texts), bool),
    open=jnp.ones(rows, bool),
  )
  first = jnp.broadcast_to(logits[:, None], (rows, beams, vocab))
  search = advance(start, jnp.int32(0), first)
  carry = jax.lax.while_loop(unfinished, go_on, (jnp.int32(1), search, state))
  search = carry[1]
  if beam.rules == "lora":
    rest = search.scores / penalties[-1]
    return _better(search.found, search.ids, rest, jnp.int32(max_new_tokens))
  return search.found


def best_words(
  scores: Float[Array, "rows beams vocab"], *, keep: int
) -> tuple[
  Float[Array, "rows keep"], Int[Array, "rows keep"], Int[Array, "rows keep"]
]:
  """The highest scores of all beams and words, falling; their beams and words.

  Of equal ones the first. Only `keep` blocks are searched, those with the
  highest maxima: no other can have one of the highest scores.
  """
  rows, _, vocab = scores.shape
  flat = scores.reshape(rows, -1)
  short = -flat.shape[1] % BLOCK
  flat = jnp.pad(flat, ((0, 0), (0, short)), constant_values=-jnp.inf)
  blocks = flat.reshape(rows, -1, BLOCK)
  count = min(keep, blocks.shape[1])
  _, best = jax.lax.top_k(blocks.max(axis=2), count)
  best = jnp.sort(best, axis=1)  # the first of equal scores stays the first
  some = jnp.take_along_axis(blocks, best[:, :, None], axis=1)
  values, places = jax.lax.top_k(some.reshape(rows, -1), keep)
  block = jnp.take_along_axis(best, places // BLOCK, axis=1)
  beams, tokens = jnp.divmod(block * BLOCK + places % BLOCK, vocab)
  return values, beams, tokens


def _hf(
  search: Search,
  ids: Int[Array, "rows keep new"],
  values: Float[Array, "rows keep"],
  origins: Int[Array, "rows keep"],
  ended: Bool[Array, "rows keep"],
  step: Int[Array, ""],
  penalties: Float[Array, " new"],
  *,
  beam: Beam,
) -> Search:
  """transformers' rules: what becomes of the candidates of a step.

  Args:
    search: before the step.
    ids, values, origins: of the candidates, falling by values.
    ended: whose last token ends a text.
    step: from 0.
    penalties: of lengths from 1.
    beam: the settings.
  """
  beams, new = beam.beams, ids.shape[2]
  ended |= step + 1 == new  # at the maximal length all of them end
  # the candidates that go on are the next beams
  scores, which = jax.lax.top_k(values + LOW * ended, beams)

  # Those that ended, if among as many as beams, compete with earlier ones,
  # in rows that are still open.
  leading = ended & (jnp.arange(ended.shape[1])[None] < beams)
  full = jnp.all(search.ended, axis=1) & (beam.early_stopping is True)
  candidates = values / penalties[step]
  for out in (full[:, None], ~search.open[:, None], ~leading):
    candidates += LOW * out
  found = search.found
  all_scores = jnp.concatenate([found.scores, candidates], axis=1)
  all_ids = jnp.concatenate([found.ids, ids], axis=1)
  length = jnp.broadcast_to(step + 1, ended.shape).astype(jnp.int32)
  all_lengths = jnp.concatenate([found.lengths, length], axis=1)
  all_ended = jnp.concatenate([search.ended, leading], axis=1)
  best_scores, best = jax.lax.top_k(all_scores, beams)
  now_ended = jnp.take_along_axis(all_ended, best, axis=1)

  # A row stays open while its best beam may beat the worst finished text.
  length = penalties[step]
  if beam.early_stopping == NEVER and beam.length_penalty > 0:
    length = penalties[-1]
  worst = jnp.where(now_ended, best_scores.min(axis=1, keepdims=True), LOW)
  better = jnp.any(scores[:, :1] / length > worst, axis=1)
  is_open = search.open & better
  if beam.early_stopping is True:
    is_open &= ~jnp.all(now_ended, axis=1)
  return Search(
    ids=jnp.take_along_axis(ids, which[:, :, None], axis=1),
    scores=scores,
    origins=jnp.take_along_axis(origins, which, axis=1),
    found=Found(
      jnp.take_along_axis(all_ids, best[:, :, None], axis=1),
      jnp.take_along_axis(all_lengths, best, axis=1),
      best_scores,
      found.finite,
    ),
    ended=now_ended,
    open=is_open,
  )


def _lora(
  search: Search,
  ids: Int[Array, "rows beams new"],
  values: Float[Array, "rows beams"],
  origins: Int[Array, "rows beams"],
  ended: Bool[Array, "rows beams"],
  step: Int[Array, ""],
  penalties: Float[Array, " new"],
  *,
  beam: Beam,
) -> Search:
  """microsoft/LoRA's rules; the arguments are those of `_hf`."""
  candidates = jnp.where(ended, values / penalties[step], -jnp.inf)
  found = _better(search.found, ids, candidates, step + 1)
  scores = jnp.where(ended, -jnp.inf, values)
  # All steps count, but some can change nothing: a sum of log probabilities
  # only falls, so no text can come to score above this.
  longest = penalties[-1] if beam.length_penalty > 0 else penalties[step]
  hope = scores.max(axis=1) / longest
  return Search(
    ids=ids,
    scores=scores,
    origins=origins,
    found=found,
    ended=search.ended | (found.lengths > 0),
    open=found.scores[:, 0] < hope,
  )


def _better(
  found: Found,
  ids: Int[Array, "rows beams new"],
  scores: Float[Array, "rows beams"],
  length: Int[Array, ""],
) -> Found:
  """The best of the texts in place of the one that was found, if better."""
  best = jnp.argmax(scores, axis=1)[:, None]
  score = jnp.take_along_axis(scores, best, axis=1)
  text = jnp.take_along_axis(ids, best[:, :, None], axis=1)
  better = score > found.scores
  return Found(
    jnp.where(better[:, :, None], text, found.ids),
    jnp.where(better, length, found.lengths).astype(jnp.int32),
    jnp.where(better, score, found.scores),
    found.finite,
  )
