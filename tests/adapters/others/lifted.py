"""Layers of flax that are derived from, normalised, mapped, tied, repeated:
each of the ways by which what is multiplied is not what a parameter says, or
is it once more."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tests.adapters.others.other import HEADS, Other, ids, normal


def standardised(kernel):
  """Without its columns' means, and with a deviation of 1."""
  kernel = kernel - kernel.mean(0, keepdims=True)
  return kernel / (kernel.std(0, keepdims=True) + 1e-5)


def overriding(kind: Any, name: str = "kernel") -> Any:
  """A class of layers that standardises a parameter when it is made."""

  class Standardised(kind):
    def param(self, given, *args, **kwargs):
      value = super().param(given, *args, **kwargs)
      return standardised(value) if given == name else value

  return Standardised


StdDense = overriding(nn.Dense)
StdHeads = overriding(nn.DenseGeneral)
StdEinsum = overriding(nn.Einsum)
StdEmbed = overriding(nn.Embed, "embedding")


class SetupEmbed(nn.Embed):
  """Overrides `setup`, and inherits `__call__` and `attend`."""

  def setup(self):
    shape = self.num_embeddings, self.features
    first = nn.initializers.normal(1.0)
    self.embedding = standardised(self.param("embedding", first, shape))


class OwnCall(nn.Dense):
  """Squares its kernel, so that it is monotone."""

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", self.bias_init, (self.features,))
    return x @ jnp.square(kernel) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class MaskedDense(nn.Dense):
  """An autoregressive layer: entries of its kernel count as 0."""

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    kernel = self.param("kernel", self.kernel_init, shape)
    return x @ jnp.where(jnp.tri(*shape, dtype=bool), kernel, 0)


class PropertyDense(nn.Module):
  """No layer of flax's; its kernel is a property."""

  features: int
  inputs: int

  def setup(self):
    shape = self.inputs, self.features
    self.weight = self.param("weight", nn.initializers.lecun_normal(), shape)

  @property
  def kernel(self):
    return standardised(self.weight)

  def __call__(self, x):
    return x @ self.kernel


class StandardisedLayers(nn.Module):
  """Each kind of layer, with such a class."""

  @nn.compact
  def __call__(self, words):
    table = StdEmbed(7, 4, name="table")
    x = table(words)
    x = x + SetupEmbed(7, 4, name="second_table")(words)
    x = nn.tanh(StdDense(6, name="dense")(x))
    x = nn.tanh(StdHeads((2, 3), name="heads")(x)).reshape(*x.shape[:-1], 6)
    x = nn.tanh(StdEinsum((6, 5), "BTD,DE->BTE", name="einsum")(x))
    x = nn.tanh(OwnCall(5, name="squared")(x))
    x = nn.tanh(PropertyDense(5, 5, name="property")(x))
    x = MaskedDense(4, name="masked")(x)
    return table.attend(x)


def rounded(x, y, dimension_numbers, precision=None, **kwargs):
  """A product of numbers that are rounded to a sixteenth, as quantisation
  rounds them; their gradients are passed on."""
  x, y = (a + jax.lax.stop_gradient(jnp.round(16 * a) / 16 - a) for a in (x, y))
  return jax.lax.dot_general(x, y, dimension_numbers, precision)


def promoted(*args, dtype=None, inexact=True):
  """flax's promotion of types, which standardises what has two axes and as
  many rows as the layer has inputs."""
  x, kernel, bias = promote_dtype(*args, dtype=dtype, inexact=inexact)
  return x, None if kernel is None else standardised(kernel), bias


class HookedLayers(nn.Module):
  """Flax's classes as they are, with functions of the model's in them."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(6, dot_general=rounded, name="rounded")(x))
    x = nn.tanh(nn.Dense(5, promote_dtype=promoted, name="promoted")(x))
    return nn.Dense(3, name="head")(x)


class WeightNormed(nn.Module):
  """flax's `WeightNorm` on a dense layer, a convolution and a whole module; of
  one all parameters are normalised, another has no scale."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.WeightNorm(nn.Conv(4, (3,), name="conv"))(x))
    x = nn.tanh(nn.WeightNorm(nn.Dense(6, name="dense"), use_scale=False)(x))
    attention = nn.MultiHeadDotProductAttention(2, name="attention")
    x = x + nn.WeightNorm(attention)(x, x)
    every = nn.Dense(5, bias_init=nn.initializers.ones, name="every")
    x = nn.tanh(nn.WeightNorm(every, variable_filter=None)(x))
    return nn.Dense(3, name="head")(x)


def mapped(kind: Any, change: Any) -> Any:
  """A layer's class whose kernel is changed on its way to the product."""

  def changed(tree):
    own = tree["params"]
    kernel = {"kernel": change(own["kernel"])} if "kernel" in own else {}
    return {"params": {**own, **kernel}}

  return nn.map_variables(
    kind, "params", changed, lambda tree: tree, init=True, mutable=True
  )


class MappedLayers(nn.Module):
  """Kernels that are symmetric, of causal entries alone, gathered from other
  devices (here as they are), and a slice of a stack."""

  @nn.compact
  def __call__(self, x):
    symmetric = mapped(nn.Dense, lambda k: jnp.triu(k) + jnp.triu(k, 1).T)
    causal = mapped(nn.Dense, jnp.triu)
    same = mapped(nn.Dense, lambda k: k)
    x = nn.tanh(symmetric(4, name="symmetric")(x))
    x = nn.tanh(causal(4, name="causal")(x))
    x = nn.tanh(same(6, name="same")(x))
    return nn.Dense(3, name="head")(x)


class TiedCoder(nn.Module):
  """Decodes by the transposed kernel of the layer that encodes, which
  `map_variables` turns."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(6, use_bias=False, name="encoder")
    z = nn.tanh(nn.Dense(4, name="first")(x))
    z = nn.tanh(layer(z))

    def back(layer, z):
      return layer.clone(features=4, name=None, parent=None).apply(
        {"params": {"kernel": layer.variables["params"]["kernel"].T}}, z
      )

    return back(layer, z)


class Repeated(nn.Module):
  """A layer that is called twice, one in a loop that shares its parameters
  and one that other code calls again behind `nn.remat` and `nn.jit`."""

  @nn.compact
  def __call__(self, x):
    twice = nn.Dense(4, name="twice")
    x = nn.tanh(twice(nn.tanh(twice(x))))
    universal = nn.scan(
      lambda layer, x, _: (nn.tanh(layer(x)), None),
      variable_broadcast=("params", "projections"),
      split_rngs={"params": False},
      length=3,
    )
    x, _ = universal(nn.Dense(4, name="universal"), x, None)
    x = nn.tanh(nn.remat(nn.Dense)(6, name="remade")(x))
    x = nn.tanh(nn.jit(nn.Dense)(5, name="compiled")(x))
    choose = nn.Dense(4, name="left"), nn.Dense(4, name="right")
    if self.is_initializing():
      x = choose[0](x) + choose[1](x)
    else:
      x = nn.cond(
        jnp.asarray(True),
        lambda m, x: choose[0](x),
        lambda m, x: choose[1](x),
        self,
        x,
      )
    return nn.Dense(3, name="head")(x)


class Mapped(nn.Module):
  """An ensemble of critics under `nn.vmap`, each with its own parameters, and
  a layer under it that all rows share."""

  @nn.compact
  def __call__(self, x):
    shared = nn.vmap(
      nn.Dense,
      variable_axes={"params": None, "projections": None},
      split_rngs={"params": False},
    )
    x = nn.tanh(shared(4, name="shared")(x))
    critics = nn.vmap(
      Critic,
      in_axes=None,
      variable_axes={"params": 0, "projections": 0},
      split_rngs={"params": True},
      axis_size=3,
    )
    return critics(name="critics")(x)


class Critic(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(nn.relu(nn.Dense(5)(x)))


class Quantised(nn.Module):
  """What takes a dense layer's place in a model: the same parameters, the
  kernel rounded to an eighth, with a gradient as if it weren't."""

  features: int

  @nn.compact
  def __call__(self, x):
    first = nn.initializers.lecun_normal()
    kernel = self.param("kernel", first, (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    kernel += jax.lax.stop_gradient(jnp.round(8 * kernel) / 8 - kernel)
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def in_its_place(next_fun, args, kwargs, context):
  """Interceptor: another module, in the scope of a layer of this name."""
  layer = context.module
  if context.method_name != "__call__" or layer.name != "quantised":
    return next_fun(*args, **kwargs)
  other = Quantised(layer.features, parent=layer.scope)
  return other(*args, **kwargs)


class Intercepted(nn.Module):
  """Has an interceptor of its own, as gemma's quantisation has."""

  @nn.compact
  def __call__(self, x):
    with nn.intercept_methods(in_its_place):
      x = nn.tanh(nn.Dense(6, name="quantised")(x))
      return nn.Dense(3, name="head")(x)


class Dropped(nn.Dense):
  """DropConnect: entries of the kernel are dropped in training."""

  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    if name == "kernel" and self.has_rng("dropout"):
      kept = jax.random.bernoulli(self.make_rng("dropout"), 0.7, value.shape)
      value = jnp.where(kept, value / 0.7, 0)
    return value


class Frozen(nn.Dense):
  """The gradient of its kernel is stopped, and so an adapter's is."""

  def param(self, name, *args, **kwargs):
    return jax.lax.stop_gradient(super().param(name, *args, **kwargs))


class StdCell(nn.RNNCellBase):
  """A recurrent cell with layers that standardise their kernels."""

  @nn.compact
  def __call__(self, state, x):
    state = nn.tanh(StdDense(4, name="i")(x) + StdDense(4, name="h")(state))
    return state, state

  def initialize_carry(self, rng, shape):
    return jnp.zeros((*shape[:-1], 4))

  @property
  def num_feature_axes(self):
    return 1


class TrainedLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(Dropped(6, name="dropped")(x))
    x = nn.tanh(Frozen(4, name="frozen")(x))
    x = nn.RNN(StdCell(name="cell"), name="loop")(x)
    return nn.Dense(3, name="head")(x)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.Dense(4)(nn.tanh(nn.Dense(6)(x))), None


class SecondAxis(nn.Module):
  """Stacks layers on their parameters' second axis, as t5x and maxtext do."""

  @nn.compact
  def __call__(self, x):
    second = nn.scan(
      Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=2
    )
    x, _ = second(name="second")(x, None)
    return nn.Dense(3, name="head")(x)


class Unrolled(nn.Module):
  """Makes a stack by a scan, and calls each layer with a slice of it, as
  axlearn does."""

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(
      Block,
      variable_axes={"params": 0, "projections": 0},
      split_rngs={"params": True},
      length=2,
    )(name="unrolled")
    if self.is_initializing():
      x, _ = stack(x, None)
    else:
      own = stack.variables["params"]
      for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], own)
        x, _ = Block(parent=None).apply({"params": one}, x)
    return nn.Dense(3, name="head")(x)


X = normal(2, 5, 4)
MODELS = {
  "layers that standardise their parameters": Other(
    "classes as numpyro, scvi-tools and monotone networks derive them",
    StandardisedLayers(),
    (ids(2, 5, below=7),),
    axes={"heads": 1},
  ),
  "layers with a function of the model's": Other(
    "google/aqt's way, a `dot_general`; flax's field `promote_dtype`",
    HookedLayers(),
    (X,),
  ),
  "flax's WeightNorm": Other(
    "google/flax: nn.WeightNorm", WeightNormed(), (X,), axes=HEADS
  ),
  "flax's map_variables": Other(
    "google/flax: nn.map_variables", MappedLayers(), (X,)
  ),
  "an autoencoder with tied weights": Other(
    "google/flax: nn.map_variables' example", TiedCoder(), (X,)
  ),
  "shared and repeated layers": Other(
    "google/flax: nn.scan, nn.remat, nn.jit, nn.cond", Repeated(), (X,)
  ),
  "layers with a say in their training": Other(
    "classes as for DropConnect and feedback alignment; a cell of them",
    TrainedLayers(),
    (X,),
    streams=("dropout",),
  ),
  "a model that intercepts its layers": Other(
    "google-deepmind/gemma: peft's interceptors", Intercepted(), (X,)
  ),
  "a stack on the second axis": Other(
    "google-research/t5x: param_scan_axis", SecondAxis(), (X,)
  ),
  "a stack, unrolled": Other("apple/axlearn: Repeat", Unrolled(), (X,)),
  "an ensemble": Other("google/flax: nn.vmap", Mapped(), (X,)),
}
