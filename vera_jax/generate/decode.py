"""A decoder and its cache, bound to the loops of sampling and beam search.

The prompts are read at once, padded on the right, each into its own row of the
cache; then each row's next token goes to the slot behind its last one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from vera_jax.generate.beam import Beam, Found, beam_search
from vera_jax.generate.sampling import (
  Answers,
  Sampling,
  TokensToLogits,
  sample,
)
from vera_jax.models.decoder import Cache, empty_cache
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
    lengths: of the prompts, in tokens, 1 or more.
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


def reader(module: nn.Module, variables: Any) -> TokensToLogits:
  """`tokens_to_logits` of a decoder, whose state is its cache."""

  return lambda ids, cache: read_tokens(module, variables, cache, ids)


def take_rows(
  cache: Cache, rows: Int[Array, " taken"], *, shared: int = 0
) -> Cache:
  """The cache with these rows, in this order, some of them several times.

  Args:
    cache: of any rows.
    rows: their numbers; with `shared` as many as the cache has.
    shared: how many of the first slots are the same in a row and in that which
      takes its place, as a prompt's are in its beams: they are not copied.
  """

  def take(old: Array) -> Array:
    new = jnp.take(old[:, :, shared:], rows, axis=1)
    return old.at[:, :, shared:].set(new) if shared else new

  keys, values = take(cache.keys), take(cache.values)
  return Cache(keys, values, cache.positions[rows])


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
  shared: int = 0,
  dtype: DTypeLike = jnp.float32,
) -> Answers | Found:
  """Answers to prompts of different lengths; the whole of it can be compiled.

  Args:
    module: a decoder, with or without an adapter on it.
    config: of the decoder.
    variables: its parameters, and projections if it has any.
    prompts: padded on the right.
    lengths: of the prompts, in tokens, 1 or more.
    keys: one for each row; beam search draws nothing.
    how: words are chosen; sampling gives `Answers`, a search `Found`.
    eos: the ids that end a text.
    max_new_tokens: the most tokens of an answer.
    pad: what stands behind an answer's end.
    shared: tokens that every prompt has at least; a search copies the cache
      behind them only.
    dtype: that the module computes in.
  """
  rows, length = prompts.shape
  # the last new token is read by nobody
  cache = empty_cache(config, rows, length + max_new_tokens - 1, dtype)
  logits, cache = prefill(module, variables, cache, prompts, lengths)
  read = reader(module, variables)
  if isinstance(how, Sampling):
    return sample(
      read,
      logits,
      cache,
      prompts,
      lengths,
      keys,
      sampling=how,
      eos=eos,
      max_new_tokens=max_new_tokens,
      pad=pad,
    )

  def take(cache: Cache, chosen: Array) -> Cache:
    grows = len(chosen) != len(cache.positions)
    return take_rows(cache, chosen, shared=0 if grows else shared)

  return beam_search(
    read,
    take,
    logits,
    cache,
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
    "shared",
    "dtype",
  ),
)
