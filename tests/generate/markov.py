"""A model without weights: a word's logits depend on the two words before."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vera_jax.generate.beam import Beam, beam_search
from vera_jax.generate.sampling import sample

WORDS = 12
EOS = (0, 1)


def random_table(seed: int, *, words: int = WORDS, spread=1.5) -> np.ndarray:
  """Logits [before last, last, next], one after another by the seed."""
  rng = np.random.default_rng(seed)
  return (spread * rng.standard_normal((words,) * 3)).astype(np.float32)


def chain(chances: dict[int, dict[int, float]], *, words: int) -> np.ndarray:
  """Logits where only the last word counts, from its next words' chances."""
  table = np.full((words, words), -np.inf, np.float32)
  table[:, 0] = 0.0
  for word, following in chances.items():
    table[word, 0] = -np.inf
    assert abs(sum(following.values()) - 1) < 1e-6
    for after, chance in following.items():
      table[word, after] = np.log(chance)
  return np.broadcast_to(table, (words, words, words))


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  ids = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return ids, lengths


def start(table, prompts, lengths):
  """The first logits and the state, which is the last word of each row."""
  last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
  two = jnp.maximum(lengths[:, None] - 2, 0)
  before = jnp.take_along_axis(prompts, two, axis=1)[:, 0]
  before = jnp.where(lengths > 1, before, 0)
  return table[before, last], last


def beam_reader(table):
  def tokens_to_logits(ids, origins, last):
    last = jnp.take_along_axis(last, origins, axis=1)
    return table[last, ids], ids

  return tokens_to_logits


def reader(table):
  def tokens_to_logits(ids, last):
    return table[last, ids[:, 0]], ids[:, 0]

  return tokens_to_logits


@partial(jax.jit, static_argnames=("beam", "new", "eos"))
def _search(table, prompts, lengths, *, beam, new, eos):
  logits, state = start(table, prompts, lengths)
  return beam_search(
    beam_reader(table),
    logits,
    jnp.repeat(state[:, None], beam.beams, axis=1),
    prompts,
    lengths,
    beam=beam,
    eos=eos,
    max_new_tokens=new,
  )


@partial(jax.jit, static_argnames=("sampling", "new", "eos"))
def _sample(table, prompts, lengths, keys, *, sampling, new, eos):
  logits, state = start(table, prompts, lengths)
  return sample(
    reader(table),
    logits,
    state,
    prompts,
    lengths,
    keys,
    sampling=sampling,
    eos=eos,
    max_new_tokens=new,
  )


def search(
  table, prompts, *, new: int = 8, eos=EOS, finite=(True,), **settings
):
  """Each prompt's texts, best first, and their scores.

  Its logits must be numbers, or not, as `finite` says of the prompts or of all.
  """
  found = _search(
    jnp.asarray(table),
    *map(jnp.asarray, padded(prompts)),
    beam=Beam(**settings),
    new=new,
    eos=tuple(eos),
  )
  ids, lengths, scores, numbers = jax.tree.map(np.asarray, found)
  assert (numbers == finite).all()
  return [
    [
      (ids[row, text, : lengths[row, text]].tolist(), float(scores[row, text]))
      for text in range(ids.shape[1])
    ]
    for row in range(len(prompts))
  ]


def sampled(
  table, prompts, keys, sampling, *, new: int = 8, eos=EOS, finite=(True,)
):
  """Each prompt's answer; `finite` as for `search`."""
  answers = _sample(
    jnp.asarray(table),
    *map(jnp.asarray, padded(prompts)),
    keys,
    sampling=sampling,
    new=new,
    eos=tuple(eos),
  )
  ids, lengths, numbers = map(np.asarray, answers)
  assert (numbers == finite).all()
  return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
