"""flax's examples: seq2seq, sst2, wmt and, of 2021, PixelCNN++."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.adapters.others.other import HEADS, Other, ids, normal


class DecoderLSTMCell(nn.RNNCellBase):
  """A recurrent cell with another one in it, which samples what it reads."""

  features: int
  words: int

  @nn.compact
  def __call__(self, carry, x):
    state, last = carry
    state, y = nn.LSTMCell(self.features)(state, x)
    logits = nn.Dense(self.words)(y)
    drawn = jax.random.categorical(self.make_rng("lstm"), logits)
    return (state, jax.nn.one_hot(drawn, self.words) + 0 * last), logits

  @property
  def num_feature_axes(self):
    return 1


class Seq2seq(nn.Module):
  @nn.compact
  def __call__(self, questions, answers):
    encoder = nn.RNN(nn.LSTMCell(5), return_carry=True, name="encoder")
    cell = DecoderLSTMCell(5, answers.shape[-1])
    decoder = nn.RNN(
      cell,
      split_rngs={"params": False, "lstm": True, "adapter": True},
      name="decoder",
    )
    lengths = jnp.asarray([3, 4])
    state, _ = encoder(questions, seq_lengths=lengths)
    return decoder(answers, initial_carry=(state, answers[:, 0]))


class SimpleLSTM(nn.Module):
  """A loop of its own over time."""

  features: int

  @partial(
    nn.scan,
    variable_broadcast=("params", "projections"),
    in_axes=1,
    out_axes=1,
    split_rngs={"params": False},
  )
  @nn.compact
  def __call__(self, carry, x):
    return nn.OptimizedLSTMCell(self.features)(carry, x)

  def start(self, rows):
    return jnp.zeros((rows, self.features)), jnp.zeros((rows, self.features))


class WordTable(nn.Module):
  """Looks up rows of a parameter itself."""

  words: int
  features: int

  def setup(self):
    shape = self.words, self.features
    self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape)

  def __call__(self, words):
    return self.embedding[words]


class Sentiment(nn.Module):
  """Two LSTMs, one backwards, and attention by keys alone."""

  def setup(self):
    self.embedder = WordTable(9, 4)
    self.forward_lstm = SimpleLSTM(3)
    self.backward_lstm = SimpleLSTM(3)
    self.keys = nn.Dense(5, use_bias=False)
    self.energy = nn.Dense(1, use_bias=False)
    self.output_layer = nn.Dense(2, use_bias=False)

  def __call__(self, words, lengths):
    x = self.embedder(words)
    steps = jnp.arange(x.shape[1])[None]
    turned = (lengths[:, None] - 1 - steps) % x.shape[1]
    start = self.forward_lstm.start(len(x))
    _, there = self.forward_lstm(start, x)
    back = jnp.take_along_axis(x, turned[..., None], 1)
    _, back = self.backward_lstm(start, back)
    back = jnp.take_along_axis(back, turned[..., None], 1)
    x = jnp.concatenate([there, back], -1)
    energy = self.energy(nn.tanh(self.keys(x)))[..., 0]
    weights = nn.softmax(jnp.where(steps < lengths[:, None], energy, -jnp.inf))
    return self.output_layer(jnp.einsum("bt,btd->bd", weights, x))


class TranslationBlock(nn.Module):
  """Attends to itself and, in the decoder, to the encoder's result."""

  @nn.compact
  def __call__(self, x, mask, encoded=None, encoded_mask=None):
    attention = partial(nn.MultiHeadDotProductAttention, 2, use_bias=False)
    y = nn.LayerNorm()(x)
    x = x + attention()(y, mask=mask)
    if encoded is not None:
      x = x + attention()(nn.LayerNorm()(x), encoded, mask=encoded_mask)
    y = nn.relu(nn.Dense(6)(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(y)


class Translation(nn.Module):
  """One table, given to both halves; its transpose makes the logits."""

  def setup(self):
    self.shared_embedding = nn.Embed(11, 4)
    self.encoderblock_0 = TranslationBlock()
    self.encoderdecoderblock_0 = TranslationBlock()
    self.norm = nn.LayerNorm()

  def __call__(self, inputs, targets):
    mask = nn.make_attention_mask(inputs > 0, inputs > 0)
    encoded = self.encoderblock_0(self.shared_embedding(inputs), mask)
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    seen = nn.combine_masks(
      nn.make_attention_mask(targets > 0, targets > 0),
      nn.make_causal_mask(targets),
    )
    both = nn.make_attention_mask(targets > 0, inputs > 0)
    y = self.encoderdecoderblock_0(
      self.shared_embedding(shifted), seen, encoded, both
    )
    return self.shared_embedding.attend(self.norm(y)) / 2.0


class ConvWeightNorm(nn.Module):
  """A convolution with a kernel of length `scale`, all of which lie in one
  parameter that is a tree; made by what its first output is."""

  features: int
  window: tuple[int, int]
  padding: Any

  @nn.compact
  def __call__(self, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    shape = (*self.window, x.shape[-1], self.features)

    def conv(kernel):
      return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), self.padding, dimension_numbers=numbers
      )

    def unit(direction):
      length = jnp.sqrt(jnp.square(direction).sum((0, 1, 2), keepdims=True))
      return direction / length

    def first(key):
      direction = nn.initializers.normal()(key, shape)
      y = conv(unit(direction))
      scale = 1 / y.std((0, 1, 2))
      bias = -y.mean((0, 1, 2)) * scale
      return {"direction": direction, "scale": scale, "bias": bias}

    own = self.param("weightnorm_params", first)
    scale = own["scale"].reshape(1, 1, 1, -1)
    return conv(scale * unit(own["direction"])) + own["bias"].reshape(
      1, 1, 1, -1
    )


class PixelCNN(nn.Module):
  """Two gated units in which nothing flows upwards."""

  @nn.compact
  def __call__(self, images):
    down = ((1, 0), (1, 1))
    x = ConvWeightNorm(4, (2, 3), down)(images)
    for _ in range(2):
      y = jnp.concatenate([nn.elu(x), nn.elu(-x)], -1)
      y = nn.elu(ConvWeightNorm(4, (2, 3), down)(y))
      a, b = jnp.split(ConvWeightNorm(8, (2, 3), down)(y), 2, -1)
      x = x + a * nn.sigmoid(b)
    return nn.Conv(3, (1, 1), name="head")(x)


ORIGIN = "google/flax: examples/"
LENGTHS = np.asarray([4, 6])
MODELS = {
  "flax's seq2seq": Other(
    ORIGIN + "seq2seq",
    Seq2seq(),
    (normal(2, 4, 6), normal(2, 5, 6)),
    streams=("lstm",),
  ),
  "flax's sst2, two LSTMs": Other(
    ORIGIN + "sst2", Sentiment(), (ids(2, 6, below=9), LENGTHS)
  ),
  "flax's wmt, with a shared table": Other(
    ORIGIN + "wmt, lm1b, nlp_seq",
    Translation(),
    (ids(2, 5, below=11), ids(2, 4, below=11)),
    axes=HEADS,
  ),
  "flax's PixelCNN++": Other(
    ORIGIN + "pixelcnn (2021)", PixelCNN(), (normal(2, 5, 5, 3),)
  ),
}
