"""Cross-entropy in blocks: the plain one's values, slopes, and less memory."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.operations.cross_entropy import cross_entropy, score_words
from vera_jax.operations.split_words import Split, words_are_split
from vera_jax.pretrained.sharding import make_mesh

ROWS, READS, WIDTH, VOCABULARY = 2, 7, 5, 11
BLOCK = 3 * ROWS * VOCABULARY  # three columns, and the last block has one
WORDS = 2 * ROWS * READS  # two words, of a vocabulary that two do not divide


@pytest.fixture(scope="module")
def words():
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((ROWS, READS, WIDTH))
  kernel = 2 * rng.standard_normal((WIDTH, VOCABULARY))
  labels = rng.integers(0, VOCABULARY, (ROWS, READS))
  weights = rng.random((ROWS, READS)) * (rng.random((ROWS, READS)) > 0.3)
  return hidden, kernel, labels, weights


def oracle(hidden, kernel, labels, weights, smoothing):
  """Losses and the weighted sum's slopes in float64, written out."""
  z = hidden @ kernel
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  nll = -np.log(p)
  one = np.eye(VOCABULARY)[labels]
  losses = (1 - smoothing) * (nll * one).sum(-1) + smoothing * nll.mean(-1)
  target = (1 - smoothing) * one + smoothing / VOCABULARY
  slope = weights[..., None] * (p - target)
  return losses, slope @ kernel.T, np.einsum("rcd,rcv->dv", hidden, slope)


def on_a_mesh():
  """A context in which the words are split over two devices."""
  return words_are_split(Split(make_mesh(2, 2, 2), rows=1))


@pytest.mark.parametrize(
  "context, block, smoothing",
  [(nullcontext, BLOCK, 0.0), (nullcontext, BLOCK, 0.1),
   (on_a_mesh, WORDS, 0.1)],
)  # fmt: skip
def test_values_and_slopes_are_those_in_float64(
  words, context, block, smoothing
):
  hidden, kernel, labels, weights = words
  single = [jnp.float32(array) for array in (hidden, kernel)]
  words_after = jnp.asarray(labels)

  def summed(hidden, kernel):
    losses = cross_entropy(
      hidden, kernel, words_after, smoothing=smoothing, block=block
    )
    return jnp.sum(losses * jnp.float32(weights)), losses

  with context():
    slopes, losses = jax.jit(jax.grad(summed, (0, 1), has_aux=True))(*single)
  want = oracle(hidden, kernel, labels, weights, smoothing)
  for got, true in zip((losses, *slopes), want, strict=True):
    np.testing.assert_allclose(got, true, rtol=1e-6, atol=1e-6)
  # not differentiated, and in one block: the same
  plain = cross_entropy(*single, words_after, smoothing=smoothing)
  np.testing.assert_allclose(plain, want[0], rtol=1e-6, atol=1e-6)


def test_each_run_of_an_ensemble_has_its_own(words):
  """Hidden states with an axis of runs; the kernel is frozen and has none."""
  hidden, kernel, labels, weights = words
  both = jnp.stack([jnp.float32(hidden), jnp.float32(hidden[::-1])])
  single = jnp.float32(kernel)

  def summed(hidden):
    losses = cross_entropy(hidden, single, jnp.asarray(labels), block=BLOCK)
    return jnp.sum(losses * jnp.float32(weights))

  got = jax.jit(jax.vmap(jax.grad(summed)))(both)
  for one, states in zip(got, (hidden, hidden[::-1]), strict=True):
    _, want, _ = oracle(states, kernel, labels, weights, 0)
    np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-6)


def test_scores_are_losses_and_hits(words):
  hidden, kernel, labels, weights = words
  best = (hidden @ kernel).argmax(-1)
  labels = np.where(np.arange(READS) % 2, labels, best)
  single = jnp.float32(hidden), jnp.float32(kernel), jnp.asarray(labels)
  losses, hits = score_words(*single, block=BLOCK)
  want, *_ = oracle(hidden, kernel, labels, weights, 0)
  np.testing.assert_allclose(losses, want, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(hits, best == labels)
  assert hits.any() and not hits.all()


def test_a_large_vocabulary_needs_a_fraction_of_the_memory():
  """Compiled temporaries of loss and gradient; nothing is run."""
  shapes = [
    jax.ShapeDtypeStruct((8, 256, 16), jnp.float32),
    jax.ShapeDtypeStruct((50_000, 16), jnp.float32),  # a tied embedding
    jax.ShapeDtypeStruct((8, 256), jnp.int32),
  ]

  def plain(hidden, embedding, labels):
    scores = jax.nn.log_softmax(hidden @ embedding.T)
    own = jnp.take_along_axis(scores, labels[..., None], axis=-1)
    return -jnp.sum(own)

  def ours(hidden, embedding, labels):
    return jnp.sum(cross_entropy(hidden, embedding.T, labels))

  def temporaries(function):
    compiled = jax.jit(jax.value_and_grad(function)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 8 * 256 * 50_000 * 4
  assert temporaries(plain) > logits
  assert temporaries(ours) < logits / 2
  assert temporaries(ours) < temporaries(plain) / 3
