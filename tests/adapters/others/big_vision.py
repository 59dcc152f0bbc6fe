"""big_vision's vision transformer with its pooling head, and its Gemma."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.adapters.others.other import HEADS, Other, ids, normal

WIDTH = 4


class MlpBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    y = nn.gelu(nn.Dense(self.features)(x))
    return nn.Dense(x.shape[-1])(y)


class EncoderBlock(nn.Module):
  """Returns what is between its parts, too."""

  @nn.compact
  def __call__(self, x, deterministic=True):
    y = nn.LayerNorm()(x)
    y = nn.MultiHeadDotProductAttention(2, deterministic=deterministic)(y, y)
    x = x + y
    z = MlpBlock(6)(nn.LayerNorm()(x))
    return x + z, {"sa": y, "mlp": z}


class MAPHead(nn.Module):
  """A learned query attends to all patches."""

  @nn.compact
  def __call__(self, x):
    shape = 1, 1, x.shape[-1]
    probe = self.param("probe", nn.initializers.xavier_uniform(), shape)
    probe = jnp.tile(probe, (x.shape[0], 1, 1))
    x = nn.MultiHeadDotProductAttention(2)(probe, x)
    return (x + MlpBlock(5)(nn.LayerNorm()(x)))[:, 0]


class ViT(nn.Module):
  """Scanned and rematerialised; the head is on the pooled and on each patch."""

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(
      WIDTH, (4, 4), strides=(4, 4), padding="VALID", name="embedding"
    )(images)
    x = x.reshape(x.shape[0], -1, WIDTH)
    place = nn.initializers.normal(0.5)
    x = x + self.param("pos_embedding", place, (1, *x.shape[1:]))
    block = nn.remat(EncoderBlock, prevent_cse=False, static_argnums=(2,))
    x, out = nn.scan(
      block,
      variable_axes={"params": 0, "projections": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,
      length=2,
    )(name="encoderblock")(x, True)
    x = nn.LayerNorm(name="encoder_norm")(x)
    head = nn.Dense(3, name="head")
    return head(MAPHead()(x)), head(x), out


class Einsum(nn.Module):
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, eqn, x):
    weight = self.param("w", nn.initializers.normal(0.5), self.shape)
    return jnp.einsum(eqn, x, weight)


class Embedder(nn.Module):
  """A table that two methods read, neither of which is `__call__`."""

  def setup(self):
    first = nn.initializers.normal(1.0)
    self.table = self.param("input_embedding", first, (11, WIDTH))

  def encode(self, tokens):
    return self.table[tokens] * WIDTH**0.5

  def decode(self, x):
    return x @ self.table.T


class GemmaBlock(nn.Module):
  """Keys and values of one head, which the queries' two heads share; or all
  three of as many heads. Its feed-forward reads its own parameters."""

  heads: int = 1

  @nn.compact
  def __call__(self, x):
    y = nn.RMSNorm()(x)
    if self.heads == 2:
      fused = Einsum((3, 2, WIDTH, 3), name="qkv_einsum")
      q, k, v = fused("BSD,3KDH->3BSKH", y)
    else:
      q = Einsum((2, WIDTH, 3), name="q_einsum")("BTD,NDH->BTNH", y)
      k, v = Einsum((2, 1, WIDTH, 3), name="kv_einsum")("BSD,2KDH->2BSKH", y)
    q = q.reshape(*q.shape[:2], self.heads, -1, 3)
    logits = jnp.tanh(jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / 5) * 5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    seen = seen.reshape(1, 1, 1, *seen.shape)
    weights = jax.nn.softmax(jnp.where(seen, logits, -2.4e38))
    y = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
    y = y.reshape(*y.shape[:2], 2, 3)
    out = Einsum((2, 3, WIDTH), name="attn_vec_einsum")
    x = x + out("BTNH,NHD->BTD", y)
    return x + GemmaFeedForward(name="mlp")(nn.RMSNorm()(x))


class GemmaFeedForward(nn.Module):
  @nn.compact
  def __call__(self, x):
    first = nn.initializers.normal(0.5)
    gating = self.param("gating_einsum", first, (2, WIDTH, 5))
    linear = self.param("linear", first, (5, WIDTH))
    return (nn.gelu(x @ gating[0]) * (x @ gating[1])) @ linear


class Gemma(nn.Module):
  def setup(self):
    self.embedder = Embedder()
    self.layers = [GemmaBlock(1), GemmaBlock(2)]

  def __call__(self, tokens):
    x = self.embedder.encode(tokens)
    for layer in self.layers:
      x = layer(x)
    return self.embedder.decode(x)


ORIGIN = "google-research/big_vision: models/"
MODELS = {
  "big_vision's ViT with its MAP head": Other(
    ORIGIN + "vit", ViT(), (normal(2, 8, 8, 3),), axes=HEADS
  ),
  "big_vision's Gemma": Other(
    ORIGIN + "ppp/gemma",
    Gemma(),
    (ids(2, 5, below=11),),
    axes={
      "q_einsum": (1,),
      "(kv|qkv)_einsum": (2,),
      "attn_vec_einsum": (0, 1),
    },
  ),
}
