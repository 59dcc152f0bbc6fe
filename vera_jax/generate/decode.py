"""A decoder and its cache, bound to the loops of sampling and beam search.

The prompts are read at once, padded on the right, each into its own row of the
cache; then each row's next token goes to the slot behind its last one.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key

from vera_jax.generate.beam import Beam, Finished, beam_search
from vera_jax.generate.sampling import Sampled, Sampling, sample
from vera_jax.models.decoder import Cache, Reach, empty_cache, grow
from vera_jax.models.decoder import logits as logits_of


def prefill(
  module: nn.Module,
  variables: Any,
  cache: Cache,
  prompts: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
) -> tuple[Float[Array, "rows vocab"], Cache]:
  """Reads whole prompts: the logits of the word behind each, and the cache.

  Args:
    module: a decoder, with or without an adapter on it.
    variables: its parameters, and projections if it has any.
    cache: an empty one.
    prompts: padded on the right.
    lengths: the number of tokens of each prompt, 1 or more.
  """
  real = jnp.arange(prompts.shape[1])[None] < lengths[:, None]
  outputs: Any = module.apply(
    variables,
    prompts,
    segment_ids=real.astype(jnp.int32),
    read_positions=lengths[:, None] - 1,
    cache=cache,
  )
  words, filled = outputs
  return logits_of(words)[:, 0], filled


def read_tokens(
  module: nn.Module,
  variables: Any,
  cache: Cache,
  ids: Int[Array, "rows tokens"],
) -> tuple[Float[Array, "rows vocab"], Cache]:
  """As `prefill`, for more tokens of each row, of which none is padding."""
  outputs: Any = module.apply(variables, ids, cache=cache)
  words, filled = outputs
  return logits_of(words)[:, -1], filled


class Beams(NamedTuple):
  """The cache of beams: they share their prompt's slots, and nothing moves.

  Behind its prompt a row has one slot per beam and step. A beam that continues
  another one sees what that one saw.

  Attributes:
    cache: a row for each prompt; its positions are those of the next words.
    seen: which slots each beam sees.
    at: the position of each slot's token.
    used: how many slots of each row were written to.
  """

  cache: Cache
  seen: Bool[Array, "rows beams slots"]
  at: Int[Array, "rows slots"]
  used: Int[Array, ""]


def start_beams(cache: Cache, *, beams: int, words: int) -> Beams:
  """Beams behind their prompts, with slots for so many words of each."""
  width, lengths = cache.slots, cache.positions[:, None]
  cache = grow(cache, beams * words)
  slots = jnp.arange(cache.slots)[None]
  seen = jnp.broadcast_to(slots < lengths, (len(lengths), cache.slots))
  seen = jnp.repeat(seen[:, None], beams, axis=1)
  at = jnp.where(slots < width, slots, lengths + (slots - width) // beams)
  return Beams(cache, seen, at, jnp.int32(width))


def read_beams(
  module: nn.Module,
  variables: Any,
  state: Beams,
  ids: Int[Array, "rows beams"],
  origins: Int[Array, "rows beams"],
  *,
  window: int | None,
) -> tuple[Float[Array, "rows beams vocab"], Beams]:
  """Reads one more word of each beam.

  Args:
    module: a decoder, with or without an adapter on it.
    variables: its parameters, and projections if it has any.
    state: the beams before this word.
    ids: the words.
    origins: the beams that they continue.
    window: how many tokens a token sees at most, itself included.
  """
  cache, beams = state.cache, ids.shape[1]
  # This word of each beam goes into a slot of its own; the beam sees what its
  # origin saw, and the new slot. So beams change places without a copy.
  slots = state.used + jnp.arange(beams)
  seen = jnp.take_along_axis(state.seen, origins[:, :, None], axis=1)
  seen |= slots[None, :, None] == jnp.arange(cache.slots)[None, None]
  near = None
  if window is not None:
    back = cache.positions[:, None] - state.at
    near = seen & (back < window)[:, None]
  reach = Reach(
    positions=jnp.broadcast_to(cache.positions[:, None], ids.shape),
    real=jnp.ones_like(ids, bool),
    whole=seen,
    window=near,
    slots=jnp.broadcast_to(slots, ids.shape),
  )
  outputs: Any = module.apply(variables, ids, cache=cache, reach=reach)
  words, cache = outputs
  state = Beams(cache, seen, state.at, state.used + beams)
  return logits_of(words), state


def decode(
  module: nn.Module,
  config: Any,
  variables: Any,
  prompts: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  keys: Key[Array, " rows"],
  *,
  how: Sampling | Beam,
  eos: tuple[int, ...],
  max_new_tokens: int,
  pad: int = 0,
  dtype: DTypeLike = jnp.float32,
) -> Sampled | Finished:
  """Answers to prompts of different lengths, in one program.

  Args:
    module: a decoder, with or without an adapter on it.
    config: the decoder's.
    variables: its parameters, and projections if it has any.
    prompts: padded on the right.
    lengths: the number of tokens of each prompt, 1 or more.
    keys: one for each row; beam search draws nothing.
    how: the rule by which words are taken. Sampling gives `Sampled`, a search
      gives `Finished`.
    eos: the ids that end a text.
    max_new_tokens: the most tokens of an answer.
    pad: what stands behind an answer's end.
    dtype: that the module computes in.
  """
  rows, length = prompts.shape
  cache = empty_cache(config, rows, length, dtype)
  logits, cache = prefill(module, variables, cache, prompts, lengths)
  words = max_new_tokens - 1  # the last one is never fed back
  if isinstance(how, Sampling):
    return sample(
      lambda ids, cache: read_tokens(module, variables, cache, ids),
      logits,
      grow(cache, words),
      prompts,
      lengths,
      keys,
      sampling=how,
      eos=eos,
      max_new_tokens=max_new_tokens,
      pad=pad,
    )
  read = partial(read_beams, module, variables, window=config.sliding_window)
  return beam_search(
    lambda ids, origins, state: read(state, ids, origins),
    logits,
    start_beams(cache, beams=how.beams, words=words),
    prompts,
    lengths,
    beam=how,
    eos=eos,
    max_new_tokens=max_new_tokens,
    pad=pad,
  )


# What is compiled serves all models of equal settings and shapes.
compiled_prefill = jax.jit(prefill, static_argnames="module")
compiled_read = jax.jit(read_tokens, static_argnames="module")
compiled = jax.jit(
  decode,
  static_argnames=(
    "module",
    "config",
    "how",
    "eos",
    "max_new_tokens",
    "pad",
    "dtype",
  ),
)
