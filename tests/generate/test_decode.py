"""Decoding through the cache gives what reading the whole text anew gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.markov import padded
from vera_jax.generate.beam import Beam
from vera_jax.generate.decode import compiled
from vera_jax.generate.sampling import Sampling
from vera_jax.models.decoder import logits
from vera_jax.models.family import family_of

# a sliding window, and two queries for each head of keys and values
FIELDS = {
  "model_type": "mistral",
  "vocab_size": 23,
  "initializer_range": 0.4,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 24,
  "sliding_window": 6,
}
PROMPTS = [[3, 4, 5, 6, 7], [9], [4, 4, 8]]
EOS, NEW = (0, 1), 6
WIDTH = 5 + NEW
KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.fixture(scope="module")
def parts():
  """module, config and variables of a tiny decoder with random weights."""
  family = family_of(FIELDS)
  config = family.config(FIELDS)
  module = family.module(
    config, "language_modelling", 0, scan=True, remat="none"
  )
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), **family.inputs(1, 4, 2)
  )
  rng = np.random.default_rng(3)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(
      0.5 * rng.standard_normal(leaf.shape), jnp.float32
    ),
    shapes,
  )
  return module, config, variables


@pytest.fixture(scope="module")
def decode(parts):
  def run(how, **settings):
    return compiled(
      *parts,
      *map(jnp.asarray, padded(PROMPTS)),
      KEYS,
      how=how,
      eos=EOS,
      max_new_tokens=NEW,
      **settings,
    )

  return run


@pytest.fixture(scope="module")
def chances(parts):
  """Log probabilities of the word behind each token of prompt and answer."""
  module, _, variables = parts
  apply = jax.jit(module.apply)

  def run(texts):
    # one shape for all tests; the texts are read as a whole, without a cache
    ids, lengths = padded([*texts, [0] * WIDTH])
    real = np.arange(WIDTH)[None] < lengths[:, None]
    words = apply(variables, ids, segment_ids=real.astype(np.int32))
    return jax.nn.log_softmax(logits(words))[:-1]

  return run


def texts_of(ids, lengths):
  rows = zip(PROMPTS, ids, lengths, strict=True)
  return [[*prompt, *row[:n].tolist()] for prompt, row, n in rows]


def test_greedy_through_the_cache_takes_the_likeliest_words(decode, chances):
  found = decode(Sampling())
  texts = texts_of(found.ids, found.lengths)
  likeliest = np.asarray(chances(texts)).argmax(-1)
  for row, prompt, text in zip(likeliest, PROMPTS, texts, strict=True):
    assert row[len(prompt) - 1 : len(text) - 1].tolist() == text[len(prompt) :]
    assert text[-1] in EOS or len(text) == len(prompt) + NEW
    assert not set(text[len(prompt) : -1]) & set(EOS)


def test_beams_through_the_cache_score_as_whole_texts(decode, chances):
  greedy = decode(Sampling())
  beam = Beam(beams=3, length_penalty=0.8)
  found = decode(beam)
  changed = False
  for k in range(beam.beams):
    texts = texts_of(found.ids[:, k], found.lengths[:, k])
    rows = np.asarray(chances(texts))
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
      places = np.arange(len(prompt) - 1, len(text) - 1)
      total = rows[i, places, text[len(prompt) :]].sum()
      score = total / (len(text) - len(prompt)) ** 0.8
      assert found.scores[i, k] == pytest.approx(score, rel=1e-4)
    changed |= bool((found.ids[:, k] != greedy.ids).any())
  assert changed  # beams have changed places
