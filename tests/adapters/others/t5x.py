"""t5x's layers: its own DenseGeneral and Embed, whose parameters have named
axes, in a scanned encoder and in a looped one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning

from tests.adapters.others.other import Other, ids


class DenseGeneral(nn.Module):
  """A kernel of two axes that is folded to as many as it is multiplied on."""

  features: tuple[int, ...]
  axis: tuple[int, ...] = (-1,)

  @nn.compact
  def __call__(self, x):
    axes = tuple(a % x.ndim for a in self.axis)
    sizes = tuple(x.shape[a] for a in axes)
    kernel = partitioning.param_with_axes(
      "kernel",
      nn.initializers.normal(0.5),
      (int(np.prod(sizes)), int(np.prod(self.features))),
      axes=("embed", "mlp"),
    )
    kernel = kernel.reshape(*sizes, *self.features)
    over = axes, tuple(range(len(axes)))
    return jax.lax.dot_general(x, kernel, (over, ((), ())))


class Embed(nn.Module):
  """Its table in `setup`, for `attend` as well."""

  rows: int
  features: int

  def setup(self):
    self.embedding = partitioning.param_with_axes(
      "embedding",
      nn.initializers.normal(1.0),
      (self.rows, self.features),
      axes=("vocab", "embed"),
    )

  def __call__(self, words):
    return self.embedding[words]

  def attend(self, x):
    return x @ self.embedding.T


class RelativePositionBiases(nn.Module):
  heads: int
  buckets: int

  @nn.compact
  def __call__(self, length):
    table = partitioning.param_with_axes(
      "rel_embedding",
      nn.initializers.normal(0.5),
      (self.heads, self.buckets),
      axes=("heads", "relpos_buckets"),
    )
    places = np.arange(length)
    far = np.abs(places[:, None] - places[None]).clip(max=self.buckets - 1)
    return table[:, far][None]


class EncoderLayer(nn.Module):
  @nn.compact
  def __call__(self, x, bias):
    y = nn.RMSNorm()(x)
    q, k, v = (
      DenseGeneral((2, 3), name=name)(y) for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    x = x + DenseGeneral((x.shape[-1],), (-2, -1), name="out")(y)
    y = nn.RMSNorm()(x)
    gate = nn.gelu(DenseGeneral((6,), name="wi_0")(y))
    y = gate * DenseGeneral((6,), name="wi_1")(y)
    return x + DenseGeneral((x.shape[-1],), name="wo")(y), None


class T5(nn.Module):
  """As scalable_t5 has it, the layers are scanned; a plain layer of flax's at
  the end, for t5x has none."""

  scan: bool = True

  @nn.compact
  def __call__(self, words):
    table = Embed(11, 4, name="token_embedder")
    x = table(words)
    bias = RelativePositionBiases(2, 3, name="relpos_bias")(words.shape[1])
    if self.scan:
      layers: Any = partitioning.scan_with_axes(
        EncoderLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
        axis_name="layers",
        axes_collections=("params",),
      )
      x, _ = layers(name="encoder")(x, bias)
    else:
      for i in range(2):
        x, _ = EncoderLayer(name=f"layers_{i}")(x, bias)
    x = nn.Dense(5, name="added_head")(nn.RMSNorm()(x))
    return x, table.attend(x[..., :4])


WORDS = ids(2, 5, below=11)
MODELS = {
  "t5x's own layers": Other(
    "google-research/t5x: examples/t5/layers", T5(False), (WORDS,)
  ),
  "t5x's own layers, scanned": Other(
    "google-research/t5x: examples/scalable_t5", T5(True), (WORDS,)
  ),
}
