"""Decoding through the cache gives what reading the whole text anew gives."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.markov import padded
from vera_jax.generate.beam import Beam, beam_search
from vera_jax.generate.decode import compiled, take_rows
from vera_jax.generate.sampling import Sampling
from vera_jax.models.decoder import Cache, logits
from vera_jax.models.family import family_of

SIZES = {"vocab_size": 23, "initializer_range": 0.4}
FIELDS = {
  "gpt2": {
    **SIZES,
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
  },
  "mistral": {
    **SIZES,
    "model_type": "mistral",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "sliding_window": 6,
  },
}
PROMPTS = [[3, 4, 5, 6, 7], [9], [4, 4, 8]]
EOS, NEW = (0, 1), 6
KEYS = jax.random.split(jax.random.key(0), 3)


@cache
def decoder(kind: str):
  family = family_of(FIELDS[kind])
  config = family.config(FIELDS[kind])
  module = family.module(
    config, "language_modelling", 0, scan=kind == "gpt2", remat="none"
  )
  shapes = {
    name: jnp.ones(leaf.shape, leaf.dtype)
    for name, leaf in family.inputs(1, 4, 2).items()
  }
  return module, config, jax.jit(module.init)(jax.random.key(3), **shapes)


def answers(kind, how, **settings):
  module, config, variables = decoder(kind)
  return compiled(
    module,
    config,
    variables,
    *map(jnp.asarray, padded(PROMPTS)),
    KEYS,
    how=how,
    eos=EOS,
    max_new_tokens=NEW,
    **settings,
  )


def whole_reader(module, variables):
  """Reads each row's text from its start, in a state of ids and lengths."""

  def tokens_to_logits(ids, state):
    text, lengths = state
    text = text.at[jnp.arange(len(text)), lengths].set(ids[:, 0])
    real = jnp.arange(text.shape[1])[None] <= lengths[:, None]
    words = module.apply(
      variables,
      text,
      segment_ids=real.astype(jnp.int32),
      read_positions=lengths[:, None],
    )
    return logits(words)[:, 0], (text, lengths + 1)

  return tokens_to_logits


@pytest.mark.parametrize("kind", FIELDS)
def test_greedy_through_the_cache_takes_the_likeliest_words(kind):
  module, _, variables = decoder(kind)
  found = answers(kind, Sampling())
  texts = [
    [*prompt, *row[:n].tolist()]
    for prompt, row, n in zip(PROMPTS, found.ids, found.lengths, strict=True)
  ]
  ids, lengths = padded(texts)
  real = np.arange(ids.shape[1])[None] < lengths[:, None]
  words = jax.jit(module.apply)(
    variables, ids, segment_ids=real.astype(np.int32)
  )
  likeliest = np.asarray(logits(words)).argmax(-1)
  for row, prompt, text in zip(likeliest, PROMPTS, texts, strict=True):
    assert row[len(prompt) - 1 : len(text) - 1].tolist() == text[len(prompt) :]
    ended = text[-1] in EOS
    assert ended or len(text) == len(prompt) + NEW
    assert not set(text[len(prompt) : -1]) & set(EOS)


@pytest.mark.parametrize("rules", ["hf", "lora"])
def test_beams_through_the_cache_equal_those_of_whole_texts(rules):
  kind = "mistral" if rules == "hf" else "gpt2"
  module, _, variables = decoder(kind)
  beam = Beam(beams=3, rules=rules, length_penalty=0.8, no_repeat_ngram=2)
  found = answers(kind, beam)

  @jax.jit
  def slowly(variables, prompts, lengths):
    read = whole_reader(module, variables)
    text = jnp.pad(prompts, ((0, 0), (0, NEW)))
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    first, state = read(last, (text, lengths - 1))
    return beam_search(
      read,
      lambda state, rows: jax.tree.map(lambda x: x[rows], state),
      first,
      state,
      prompts,
      lengths,
      beam=beam,
      eos=EOS,
      max_new_tokens=NEW,
    )

  expected = slowly(variables, *map(jnp.asarray, padded(PROMPTS)))
  assert (found.ids == expected.ids).all()
  assert (found.lengths == expected.lengths).all()
  np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
  shared = answers(kind, beam, shared=1)  # the shortest prompt's tokens
  assert (shared.ids == found.ids).all()
  np.testing.assert_allclose(shared.scores, found.scores, rtol=1e-6)


def test_taking_rows_of_a_cache():
  keys = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4, 1, 1)
  old = Cache(keys, -keys, jnp.array([1, 2, 3]))
  rows = jnp.array([2, 0, 0])
  new = take_rows(old, rows)
  assert (new.keys == keys[:, [2, 0, 0]]).all()
  assert (new.values == -new.keys).all()
  assert new.positions.tolist() == [3, 1, 1]
  new = take_rows(old, rows, shared=1)
  assert (new.keys[:, :, 0] == keys[:, :, 0]).all()
  assert (new.keys[:, :, 1:] == keys[:, [2, 0, 0], 1:]).all()
  assert len(take_rows(old, jnp.array([0, 0, 1, 1, 2, 2])).positions) == 6
