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


class Finished(NamedTuple):
  """The finished texts of each prompt, the best one first.

  With the rules "lora" there is one for each prompt.

  Attributes:
    ids: the new tokens, with `pad` behind each text's last one.
    lengths: how many they are, with an end token among them. It is 0 in a slot
      that no text has taken yet.
    scores: as the module says.
    finite: whether the logits of all beams were numbers. A row's search ends
      where they are not, and its texts then mean nothing.
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
    finished: the texts that have ended.
    taken: which slots of `finished` hold a text.
    open: the rows whose `finished` may still change.
  """

  ids: Int[Array, "rows beams new"]
  scores: Float[Array, "rows beams"]
  origins: Int[Array, "rows beams"]
  finished: Finished
  taken: Bool[Array, "rows texts"]
  open: Bool[Array, " rows"]


class Candidates(NamedTuple):
  """The texts that a step may go on with, the highest scores first.

  Attributes:
    ids: their new tokens, this step's among them.
    scores: the sums of their log probabilities.
    origins: the beam that each of them continues.
    ended: whether this step's token ends the text.
  """

  ids: Int[Array, "rows keep new"]
  scores: Float[Array, "rows keep"]
  origins: Int[Array, "rows keep"]
  ended: Bool[Array, "rows keep"]


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
) -> Finished:
  """The best answers to prompts of different lengths, all in one loop.

  The loop ends when no row's result can change any more.

  Args:
    tokens_to_logits: reads the last word of each beam, which continues a beam
      of the step before (see the package).
    logits: those of the first new word of each prompt.
    state: as `tokens_to_logits` takes it, every beam after its prompt.
    prompts: padded on the right.
    lengths: the number of tokens of each prompt.
    beam: the settings.
    eos: the ids that end a text.
    max_new_tokens: the most tokens of an answer.
    pad: the id that stands behind an answer's end.

  Raises:
    UserError: settings that there are not, or too few words for the beams.
  """
  beam.check()
  rows, vocab = logits.shape
  beams, lora = beam.beams, beam.rules == "lora"
  # Under hf each beam may lose all of its best candidates but one to ends of
  # text, and there must still be as many that go on as there are beams.
  keep = beams if lora else beams * max(2, 1 + len(eos))
  if keep > beams * vocab:
    raise UserError(
      f"{keep // beams} candidates are needed for each beam, but there are"
      f" only {vocab} words: name fewer ids that end a text."
    )
  # The powers come from a table, for one computed inside the loop would round
  # in another way than the reference implementations do.
  steps = np.arange(1, max_new_tokens + 1, dtype=np.float64)
  penalties = jnp.asarray(steps**beam.length_penalty, jnp.float32)
  ends = jnp.asarray(tuple(eos), jnp.int32)
  before = jnp.repeat(prompts, beams, axis=0), jnp.repeat(lengths, beams)

  def forbidden(search: Search, step: Array) -> Bool[Array, "rows beams vocab"]:
    tokens = search.ids.reshape(rows * beams, max_new_tokens)
    count = jnp.full(rows * beams, step)
    if not lora:  # hf counts the prompt's n-grams as well
      tokens, count = append(*before, tokens), before[1] + step
    words = repeats(tokens, count, size=beam.no_repeat_ngram, vocab=vocab)
    return words.reshape(rows, beams, vocab)

  def advance(search: Search, step: Array, logits: Array) -> Search:
    """One more word for each beam, from its logits."""
    logits = logits.astype(jnp.float32)
    numbers = jnp.all(are_numbers(logits), axis=1)
    # The two rules strike a forbidden word on different sides of the softmax:
    # before it the other words share its probability, after it they don't.
    if beam.no_repeat_ngram and lora:
      logits = jnp.where(forbidden(search, step), -jnp.inf, logits)
    chances = jax.nn.log_softmax(logits, axis=-1)
    # where every word is forbidden there is no softmax
    chances = jnp.where(jnp.isnan(chances), -jnp.inf, chances)
    if beam.no_repeat_ngram and not lora:
      chances = jnp.where(forbidden(search, step), -jnp.inf, chances)
    # All beams compete for the next step: a good one may be continued several
    # times, a bad one not at all. So each candidate says which it continues.
    scores, origins, tokens = best_words(
      search.scores[:, :, None] + chances, keep=keep
    )
    ids = jnp.take_along_axis(search.ids, origins[:, :, None], axis=1)
    ids = ids.at[:, :, step].set(tokens)
    candidates = Candidates(ids, scores, origins, jnp.isin(tokens, ends))
    update = _lora if lora else _hf
    after = update(search, candidates, step, penalties, beam=beam)
    # A closed row's beams are still computed, though nothing is made of them:
    # whether their logits are numbers no longer counts.
    finite = search.finished.finite & (numbers | ~search.open)
    return after._replace(
      finished=after.finished._replace(finite=finite), open=after.open & finite
    )

  def unfinished(carry: tuple[Array, Search, Any]) -> Array:
    step, search, _ = carry
    return (step < max_new_tokens) & jnp.any(search.open)

  def go_on(carry: tuple[Array, Search, Any]) -> tuple[Array, Search, Any]:
    step, search, state = carry
    last = jax.lax.dynamic_index_in_dim(search.ids, step - 1, 2, False)
    logits, state = tokens_to_logits(last, search.origins, state)
    return step + 1, advance(search, step, logits), state

  # All beams start as the prompt. All but the first one are out of the running,
  # or the same text would be followed several times.
  texts = 1 if lora else beams
  low = -jnp.inf if lora else LOW
  start = Search(
    ids=jnp.full((rows, beams, max_new_tokens), pad, jnp.int32),
    scores=jnp.full((rows, beams), low).at[:, 0].set(0.0),
    origins=jnp.zeros((rows, beams), jnp.int32),
    finished=Finished(
      jnp.full((rows, texts, max_new_tokens), pad, jnp.int32),
      jnp.zeros((rows, texts), jnp.int32),
      jnp.full((rows, texts), low),
      jnp.ones(rows, bool),
    ),
    taken=jnp.zeros((rows, texts), bool),
    open=jnp.ones(rows, bool),
  )
  # The first word comes from the prompts' own logits, so it is chosen before
  # the loop, whose steps begin by reading a word.
  first = jnp.broadcast_to(logits[:, None], (rows, beams, vocab))
  search = advance(start, jnp.int32(0), first)
  _, search, _ = jax.lax.while_loop(
    unfinished, go_on, (jnp.int32(1), search, state)
  )
  if lora:  # texts that never ended compete with the one that did
    scores = search.scores / penalties[-1]
    return _better(search.finished, search.ids, scores, max_new_tokens)
  return search.finished


def best_words(
  scores: Float[Array, "rows beams vocab"], *, keep: int
) -> tuple[
  Float[Array, "rows keep"], Int[Array, "rows keep"], Int[Array, "rows keep"]
]:
  """The highest scores of all beams and words, falling; their beams and words.

  Of equal ones the first.
  """
  rows, _, vocab = scores.shape
  flat = scores.reshape(rows, -1)
  # A top_k over beams * vocab scores is slow. The scores are cut into blocks of
  # which the maxima are cheap: a block whose maximum is not among the `keep`
  # highest maxima can't have one of the `keep` highest scores.
  short = -flat.shape[1] % BLOCK
  flat = jnp.pad(flat, ((0, 0), (0, short)), constant_values=-jnp.inf)
  blocks = flat.reshape(rows, -1, BLOCK)
  count = min(keep, blocks.shape[1])
  _, best = jax.lax.top_k(blocks.max(axis=2), count)
  best = jnp.sort(best, axis=1)  # the first of equal scores stays the first
  some = jnp.take_along_axis(blocks, best[:, :, None], axis=1)
  values, places = jax.lax.top_k(some.reshape(rows, -1), keep)
  # back from a place among the searched blocks to a beam and a word
  block = jnp.take_along_axis(best, places // BLOCK, axis=1)
  beams, tokens = jnp.divmod(block * BLOCK + places % BLOCK, vocab)
  return values, beams, tokens


def _hf(
  search: Search,
  candidates: Candidates,
  step: Int[Array, ""],
  penalties: Float[Array, " new"],
  *,
  beam: Beam,
) -> Search:
  """transformers' rules: what becomes of the candidates of a step.

  Args:
    search: before the step.
    candidates: the texts that the step may go on with.
    step: from 0.
    penalties: the divisors of texts of 1, 2, … tokens.
    beam: the settings.
  """
  ids, values, origins, ended = candidates
  ended |= step + 1 == ids.shape[2]  # at the maximal length all of them end
  # The best candidates that go on are the next beams. An ended one is pushed
  # down and not left out, so that there are always enough to fill the beams.
  scores, which = jax.lax.top_k(values + LOW * ended, beam.beams)

  # An ended candidate is a finished text only if it is among the best as many
  # as beams: a worse one would not have been followed either. It competes with
  # the texts that ended before, unless the row is closed or, under early
  # stopping, has enough of them.
  leading = ended & (jnp.arange(ended.shape[1])[None] < beam.beams)
  full = jnp.all(search.taken, axis=1) & (beam.early_stopping is True)
  competing = values / penalties[step]
  for out in (full[:, None], ~search.open[:, None], ~leading):
    competing += LOW * out
  finished = search.finished
  all_scores = jnp.concatenate([finished.scores, competing], axis=1)
  all_ids = jnp.concatenate([finished.ids, ids], axis=1)
  length = jnp.broadcast_to(step + 1, ended.shape).astype(jnp.int32)
  all_lengths = jnp.concatenate([finished.lengths, length], axis=1)
  all_taken = jnp.concatenate([search.taken, leading], axis=1)
  best_scores, best = jax.lax.top_k(all_scores, beam.beams)
  taken = jnp.take_along_axis(all_taken, best, axis=1)

  # A row stays open while its best beam may beat the worst finished text. What
  # it may come to score depends on the length that it is divided by: by now's,
  # as transformers guesses, or with "never" by the one that favours it most.
  divisor = penalties[step]
  if beam.early_stopping == NEVER and beam.length_penalty > 0:
    divisor = penalties[-1]
  worst = jnp.where(taken, best_scores.min(axis=1, keepdims=True), LOW)
  is_open = search.open & jnp.any(scores[:, :1] / divisor > worst, axis=1)
  if beam.early_stopping is True:
    is_open &= ~jnp.all(taken, axis=1)
  return Search(
    ids=jnp.take_along_axis(ids, which[:, :, None], axis=1),
    scores=scores,
    origins=jnp.take_along_axis(origins, which, axis=1),
    finished=Finished(
      jnp.take_along_axis(all_ids, best[:, :, None], axis=1),
      jnp.take_along_axis(all_lengths, best, axis=1),
      best_scores,
      finished.finite,
    ),
    taken=taken,
    open=is_open,
  )


def _lora(
  search: Search,
  candidates: Candidates,
  step: Int[Array, ""],
  penalties: Float[Array, " new"],
  *,
  beam: Beam,
) -> Search:
  """microsoft/LoRA's rules; the arguments are those of `_hf`."""
  ids, values, origins, ended = candidates
  competing = jnp.where(ended, values / penalties[step], -jnp.inf)
  finished = _better(search.finished, ids, competing, step + 1)
  # The beam of a text that ended is empty for a step: nothing continues it, and
  # the other beams' candidates take its room in the next one.
  scores = jnp.where(ended, -jnp.inf, values)
  # By these rules all steps are run, but some can change nothing: a sum of log
  # probabilities only falls, so no text can come to score above this hope.
  longest = penalties[-1] if beam.length_penalty > 0 else penalties[step]
  hope = scores.max(axis=1) / longest
  return Search(
    ids=ids,
    scores=scores,
    origins=origins,
    finished=finished,
    taken=search.taken | (finished.lengths > 0),
    open=finished.scores[:, 0] < hope,
  )


def _better(
  finished: Finished,
  ids: Int[Array, "rows beams new"],
  scores: Float[Array, "rows beams"],
  length: Int[Array, ""] | int,
) -> Finished:
  """The one finished text of each row, or the best of others that is better."""
  best = jnp.argmax(scores, axis=1)[:, None]
  score = jnp.take_along_axis(scores, best, axis=1)
  better = score > finished.scores
  new = jnp.take_along_axis(ids, best[:, :, None], axis=1)
  return Finished(
    jnp.where(better[:, :, None], new, finished.ids),
    jnp.where(better, length, finished.lengths).astype(jnp.int32),
    jnp.where(better, score, finished.scores),
    finished.finite,
  )
