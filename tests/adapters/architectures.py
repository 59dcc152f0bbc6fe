"""Small networks beyond dense layers, by others' conventions of writing them.

The decoder holds its weights as google-deepmind/gemma, big_vision and openpi
hold theirs: modules with one parameter `w`, called with an equation.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

WIDTH, HEADS, KV, HEAD = 6, 4, 2, 3


class Einsum(nn.Module):
  shape: tuple[int, ...]
  weight: str = "w"

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    w = self.param(self.weight, nn.initializers.normal(0.3), self.shape)
    return jnp.einsum(eqn, x, w)


class CastEinsum(nn.Module):
  """With the weight made in setup and cast to x's type, as openpi's."""

  shape: tuple[int, ...]

  def setup(self):
    self.w = self.param("w", nn.initializers.normal(0.3), self.shape)

  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    return jnp.einsum(eqn, x, self.w.astype(x.dtype))


class Attention(nn.Module):
  kind: Any = Einsum

  def setup(self):
    self.q_einsum = self.kind((HEADS, WIDTH, HEAD))
    self.kv_einsum = self.kind((2, KV, WIDTH, HEAD))
    self.attn_vec_einsum = self.kind((HEADS, HEAD, WIDTH))

  def __call__(self, x):
    q = self.q_einsum("BTD,NDH->BTNH", x)
    k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
    q = q.reshape(*q.shape[:2], KV, HEADS // KV, HEAD)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    probabilities = nn.softmax(jnp.where(seen, logits, -1e30))
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v)
    mixed = mixed.reshape(*mixed.shape[:2], HEADS, HEAD)
    return self.attn_vec_einsum("BTNH,NHD->BTD", mixed)


class FeedForward(nn.Module):
  """Reads its own parameters: no call that an adapter could be put on."""

  @nn.compact
  def __call__(self, x):
    first = nn.initializers.normal(0.3)
    gating = self.param("gating_einsum", first, (2, WIDTH, 8))
    linear = self.param("linear", first, (8, WIDTH))
    return nn.gelu(x @ gating[0]) * (x @ gating[1]) @ linear


class SharedFeedForward(nn.Module):
  """The same parameters, multiplied with by modules in its scope, as
  google-deepmind/gemma has it."""

  @nn.compact
  def __call__(self, x):
    gating = Einsum((2, 8, WIDTH), "gating_einsum")
    nn.share_scope(self, gating)
    gate = gating("...F,NHF->...NH", x)
    linear = Einsum((8, WIDTH), "linear")
    nn.share_scope(self, linear)
    return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Block(nn.Module):
  kind: Any = Einsum

  @nn.compact
  def __call__(self, x, _=None):
    x = x + Attention(self.kind, name="attn")(nn.RMSNorm()(x))
    feed = SharedFeedForward if self.kind is Einsum else FeedForward
    return x + feed(name="mlp")(nn.RMSNorm()(x)), None


class Decoder(nn.Module):
  kind: Any = Einsum
  scan: bool = False

  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(11, WIDTH, name="embedder")
    x = table(tokens)
    if self.scan:
      stack = nn.scan(
        Block,
        variable_axes={"params": 0, "projections": 0},
        split_rngs={"params": True},
        length=2,
      )
      x, _ = stack(self.kind, name="layer")(x, None)
    else:
      for i in range(2):
        x, _ = Block(self.kind, name=f"layer_{i}")(x)
    return table.attend(nn.RMSNorm()(x))


# Columns of the fused kernel by the result's axes 2, K, H.
KEY_VALUE = {
  "kv_einsum": {"key": (0, KV * HEAD), "value": (KV * HEAD, 2 * KV * HEAD)}
}


class Images(nn.Module):
  """A convolution in one of the ways that it can be set, between two others."""

  way: str

  @nn.compact
  def __call__(self, x):
    if self.way == "line":  # 1-D, and causal
      x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = nn.tanh(WAYS[self.way](name="conv")(x))
    return nn.Conv(3, (1,) * (x.ndim - 2), name="one")(x)


WAYS = {
  "strided": partial(nn.Conv, 4, (3, 2), 2, padding="VALID"),
  "dilated": partial(
    nn.Conv, 4, (3, 3), kernel_dilation=(1, 2), padding=[(1, 0), (2, 1)]
  ),
  "circular": partial(
    nn.Conv, 4, (3, 3), (1, 2), padding="CIRCULAR", use_bias=False
  ),
  "line": partial(nn.Conv, 4, (3,), 2, kernel_dilation=2, padding="CAUSAL"),
  "grouped": partial(nn.Conv, 6, (3, 3), feature_group_count=2),
}


class Depthwise(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), feature_group_count=4, name="depthwise")(x)
    return nn.Conv(3, (1, 1), name="one")(nn.tanh(x))


CELLS = {
  "lstm": nn.LSTMCell,
  "optimised": nn.OptimizedLSTMCell,
  "gru": nn.GRUCell,
  "simple": nn.SimpleCell,
  "mgu": nn.MGUCell,
}


class Recurrent(nn.Module):
  cell: str
  options: Any = FrozenDict()  # of nn.RNN
  param_dtype: Any = jnp.float32  # and of the first state

  @nn.compact
  def __call__(self, x):
    cell = CELLS[self.cell](4, param_dtype=self.param_dtype, name="cell")
    x = nn.RNN(cell, **self.options)(x)
    return nn.Dense(3, name="classifier")(x)


class Mixed(nn.Module):
  """Ids, a table, a convolution, two recurrent layers and an equation."""

  @nn.compact
  def __call__(self, ids):
    x: Any = nn.Embed(7, 4, name="table")(ids)
    x = nn.tanh(nn.Conv(4, (3,), 2, name="conv")(x))
    x = nn.RNN(nn.OptimizedLSTMCell(4, name="gates"))(x)
    x = nn.RNN(nn.MGUCell(4, name="cell"))(x)
    return nn.Einsum((2, 4, 3), "BTD,KDH->KBTH", name="einsum")(x)


class Tied(nn.Module):
  """Looks rows of its table up and reads it, or has an unbound layer do so."""

  unbound: bool = False

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(7, 4, name="table")
    x = nn.Dense(4, name="first")(table(ids))
    if self.unbound:
      last = nn.Dense(7, use_bias=False, parent=None)
      return last.apply({"params": {"kernel": table.embedding.T}}, x)
    return x @ table.embedding.T


class Unbound(nn.Module):
  """Applies a layer to values that are no parameters. By its path it is the
  layer before it."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="layers_0")(x)
    fixed = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    apart = nn.Sequential([nn.Dense(4, parent=None)], parent=None)
    return apart.apply({"params": {"layers_0": fixed}}, nn.tanh(x))


class Twice(nn.Module):
  """Calls a layer with two equations, by which its kernel is two matrices."""

  @nn.compact
  def __call__(self, x):
    turned = nn.Einsum((4, 4), None, use_bias=False, name="turned")
    x = turned(turned(x, "BD,DE->BE"), "BE,DE->BD")
    return nn.Dense(2, name="last")(x)


MIXED = ("table", "conv", "gates/.*", "cell/.*", "einsum")


class Bypassed(nn.Module):
  """Calls its layer while it is initialised, and later reads its kernel."""

  @nn.compact
  def __call__(self, x):
    out, first = nn.Dense(4, name="out"), nn.Dense(4, name="first")
    x = first(x)
    if self.is_initializing():
      out(x)
    return x @ out.variables["params"]["kernel"]


def bent(kind: Any) -> Any:
  """A class derived from one of flax's layers that does more than it."""

  class Bent(kind):
    def __call__(self, x):
      return 1.5 * jnp.tanh(super().__call__(x))

  return Bent


def busy(layer, y):
  """What a layer may do beside its product: with random numbers, a layer in
  it, a variable, and a value for later."""
  y = nn.Dense(y.shape[-1], name="inside")(nn.tanh(y))
  y = nn.Dropout(0.5, deterministic=False)(y)
  calls = layer.variable("counts", "calls", lambda: jnp.zeros(()))
  calls.value += 1
  layer.sow("intermediates", "mean", y.mean())
  return y


class BusyDense(nn.Dense):
  @nn.compact
  def __call__(self, x):
    return busy(self, super().__call__(x))


class BusyEinsum(nn.Module):
  @nn.compact
  def __call__(self, eqn, x):
    w = self.param("w", nn.initializers.normal(0.3), (4, 3))
    return busy(self, jnp.einsum(eqn, x, w))


class Busy(nn.Module):
  @nn.compact
  def __call__(self, x):
    return BusyEinsum(name="einsum")("BD,DE->BE", BusyDense(4, name="dense")(x))


class Derived(nn.Module):
  """Ids, and a layer of each kind that is more than flax's own."""

  @nn.compact
  def __call__(self, ids):
    x = bent(nn.Embed)(7, 4, name="table")(ids)
    x = bent(nn.Conv)(4, (3,), 2, name="conv")(x)
    x = bent(nn.Dense)(6, name="dense")(x)
    x = bent(nn.DenseGeneral)((2, 3), name="heads")(x)
    x = bent(nn.Einsum)((2, 3, 4), "BTNH,NHD->BTD", name="einsum")(x)
    return nn.remat(nn.Dense)(3, name="remade")(x)


class NestedCell(nn.RNNCellBase):
  """A cell in a cell, and a layer behind it whose output is the next input, as
  the decoder of flax's seq2seq example is written."""

  @nn.compact
  def __call__(self, carry, x):
    state, last = carry
    state, y = nn.LSTMCell(4, name="inner")(state, x + last)
    y = nn.Dense(2, name="logits")(y)
    return (state, y), y

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    inner = nn.LSTMCell(4, parent=None)
    state = inner.initialize_carry(rng, input_shape)
    return state, jnp.zeros(input_shape)

  @property
  def num_feature_axes(self):
    return 1


class Nested(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.RNN(NestedCell(name="cell"))(x)


class Shared(nn.Module):
  """A layer that a transformation runs twice, or a stack of two, in one of the
  ways that pass on no collection but `params`."""

  way: str

  @nn.compact
  def __call__(self, x):
    def run(layer, x, _):
      return nn.tanh(layer(x)), None

    mapped = partial(
      nn.vmap, variable_axes={"params": None}, split_rngs={"params": False}
    )
    match self.way:
      case "broadcast":
        scan = nn.scan(
          run,
          variable_broadcast="params",
          split_rngs={"params": False},
          length=2,
        )
        return scan(nn.Dense(4, name="layer"), x, None)[0]
      case "stacked":
        scan = nn.scan(
          run,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=2,
        )
        return scan(nn.Dense(4, name="layer"), x, None)[0]
      case "mapped":
        return mapped(nn.Dense)(4, name="layer")(x)
      case "mapped cell":
        return mapped(nn.RNN)(nn.SimpleCell(4, name="layer"))(x[:, None])
