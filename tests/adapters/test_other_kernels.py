"""Layers that multiply with something else than their parameters hold.

A layer's own code may change its kernel: then it runs on the adapted one. What
changes it on the way to the layer is refused by name. Float32 products agree
within 1e-5, gradients with those in float64 within 1e-4 of the largest.
"""

import dataclasses
from functools import partial, partialmethod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.adapters.adapted_networks import IDS, RANK, RNG, Ready, by_definition
from tests.adapters.architectures import Unbound
from vera_jax.adapters.apply import find_targets
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.interface import PLANS
from vera_jax.adapters.layers import HOOKS, KINDS
from vera_jax.adapters.lora import lora
from vera_jax.adapters.magnitude import dora
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

X = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)


def standardised(kind):
  """A class that changes its kernel in `param`, and inherits the call: so are
  the convolutions of octo, of big_vision's BiT and of hybrid ViTs written."""

  class Standardised(kind):
    def param(self, name, *args, **kwargs):
      value = super().param(name, *args, **kwargs)
      if name == "bias":
        return value
      axes = tuple(range(value.ndim - 1))
      value = value - value.mean(axes, keepdims=True)
      return 0.3 * value / (value.std(axes, keepdims=True) + 1e-5)

  return Standardised


class Standardisers(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = standardised(nn.Embed)(7, 4, name="table")(ids)
    x = standardised(nn.Conv)(4, (3,), name="conv")(x)
    x = nn.tanh(standardised(nn.Dense)(6, name="dense")(x))
    x = standardised(nn.DenseGeneral)((2, 3), name="heads")(x)
    einsum = standardised(nn.Einsum)
    return einsum((2, 3, 4), "BTNH,NHD->BTD", name="einsum")(x)


LAYERS = ["table", "conv", "dense", "heads", "einsum"]


@pytest.mark.parametrize(
  "method",
  [vera(RANK), lora(2), dora(2), ia3(feedforward=("table", "conv"))],
  ids=lambda method: method.name,
)
def test_a_kernel_that_its_layer_changes(method):
  ready = Ready(Standardisers(), method, LAYERS, IDS)
  ready.check()
  plans = {path[0]: target.view.plans for path, target in ready.targets.items()}
  assert plans == dict.fromkeys(LAYERS, ("folded",))


def test_gradients_of_a_kernel_that_its_layer_changes():
  ready = Ready(Standardisers(), vera(RANK), ["conv", "dense"], IDS)
  ready.check_gradients(ready.check("auto")["auto"], by_definition)


def twice(multiply):
  """A layer's own product that is another one."""
  return lambda x, kernel, *args, **kwargs: multiply(
    x, jnp.sin(kernel), *args, **kwargs
  )


def promoted(x, kernel, bias, **kwargs):
  return nn.dtypes.promote_dtype(x, kernel**3, bias, **kwargs)


class Hooked(nn.Module):
  """A layer per field that holds a function, and one with flax's own function
  in it."""

  @nn.compact
  def __call__(self, x):
    dot, convolve = jax.lax.dot_general, jax.lax.conv_general_dilated
    x = nn.Dense(4, dot_general=dot, name="same")(x)
    x = nn.Dense(4, dot_general=twice(dot), name="dot_general")(x)
    x = nn.DenseGeneral(
      4, dot_general_cls=lambda: twice(dot), name="dot_general_cls"
    )(x)
    x = nn.Dense(4, promote_dtype=promoted, name="promote_dtype")(x)
    x = nn.Conv(
      4, (1,), conv_general_dilated=twice(convolve), name="conv_general_dilated"
    )(x[None])
    return nn.Conv(
      3,
      (1,),
      conv_general_dilated_cls=lambda: twice(convolve),
      name="conv_general_dilated_cls",
    )(x)


def test_fields_that_hold_a_function():
  """Another product of a layer's own is taken for what it is. Where a field is
  set, nothing is assumed of what is in it."""
  ready = Ready(Hooked(), vera(RANK), ["same", *HOOKS], X)
  ready.check()
  plans = {path[0]: target.view.plans for path, target in ready.targets.items()}
  assert plans == dict.fromkeys(["same", *HOOKS], ("folded",))


class InHalf(nn.Dense):
  dtype: Any = jnp.bfloat16
  note: str = ""


class Named(nn.Dense):
  def shown(self):
    return self.name


class Partial(nn.Dense):
  param = partialmethod(nn.Dense.param)


class Derived(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = Named(4, name="defines")(InHalf(4, name="sets")(x))
    return Partial(4, name="binds")(x)


def test_classes_that_only_set_fields():
  """They are flax's; one that defines anything may compute something else."""
  targets = find_targets(Derived(), ["sets", "defines", "binds"], X)
  plans = {path[0]: target.view.plans for path, target in targets.items()}
  folded = ("folded",)
  assert plans == {"sets": PLANS, "defines": folded, "binds": folded}


def test_all_fields_of_flaxs_layers_are_known():
  """Those that the products of `KINDS` are made with, and functions."""
  known = {
    *("features", "axis", "batch_dims", "use_bias", "shape", "einsum_str"),
    *("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation"),
    *("feature_group_count", "mask", "num_embeddings"),
    *("dtype", "param_dtype", "precision", "preferred_element_type"),
    *("kernel_init", "bias_init", "embedding_init", "parent", "name"),
  }
  for kind in KINDS.keys() - {nn.Module}:
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields <= known | {*HOOKS}


def turned(params):
  return jax.tree.map(lambda leaf: leaf.T, params)


def rounded(dtype, params):
  return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def mapped(function):
  kind = nn.map_variables(nn.Dense, "params", function, init=True)
  return kind(4, name="normed")


NORMED = {
  "WeightNorm": lambda: nn.WeightNorm(nn.Dense(4, name="normed")),
  "SpectralNorm": lambda: partial(
    nn.SpectralNorm(nn.Dense(4, name="normed")), update_stats=False
  ),
  "turned": lambda: mapped(turned),
  "eight bits": lambda: mapped(partial(rounded, jnp.float8_e4m3fn)),
}


class Normed(nn.Module):
  name_: str

  @nn.compact
  def __call__(self, x):
    return NORMED[self.name_]()(nn.Dense(4, name="plain")(x))


class Decoder(nn.Module):
  """Takes one token at a time once it has its cache, and so can't be applied to
  what initialises it."""

  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(2, decode=True)(x, x)
    return nn.WeightNorm(nn.Dense(4, name="normed"))(y)


def test_a_changed_kernel_is_seen_beside_a_cache():
  x = X[None]
  with pytest.raises(UserError, match="normed: its kernel is changed on the"):
    find_targets(Decoder(), ["normed"], x)
  assert len(find_targets(Decoder(), [".*"], x)) == 4


@pytest.mark.parametrize("name", NORMED)
def test_a_kernel_that_is_changed_on_its_way_is_refused(name):
  with pytest.raises(UserError, match="normed: its kernel is changed on the"):
    find_targets(Normed(name), ["normed"], X)
  assert {*find_targets(Normed(name), [".*"], X)} == {("plain",)}


@pytest.mark.parametrize("way", ["scan", "vmap", "remat", "jit", "while"])
def test_kernels_are_followed_through_transformations(way):
  """Plain ones are targets there, and changed ones are refused."""

  class Both(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
      x = nn.Dense(4, name="plain")(x)
      return nn.WeightNorm(nn.Dense(4, name="normed"))(x), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      wrap = {
        "scan": partial(nn.scan, length=2, **axes),
        "vmap": partial(nn.vmap, axis_size=2, in_axes=None, **axes),
        "remat": nn.remat,
        "jit": nn.jit,
        "while": lambda kind: kind,
      }[way]
      both = wrap(Both)(name="both")
      if way != "while" or self.is_initializing():
        return both(x, None)[0]
      return nn.while_loop(
        lambda module, carry: carry[1] < 2,
        lambda module, carry: (module(carry[0])[0], carry[1] + 1),
        both,
        (x, 0),
      )[0]

  assert {*find_targets(Model(), [".*"], X)} == {("both", "plain")}


def test_what_a_model_applies_unbound_is_left_alone():
  """Also by a method that has no leaves at its layers, by which to tell."""
  ready = Ready(Unbound(), unilora(2, size=20), ["layers_0"], X)
  adapted, merged = ready.adapted(ready.moved), ready.merged(ready.moved)
  expected = ready.model.apply({"params": merged}, X)
  assert jnp.abs(adapted - expected).max() < 1e-5


def test_the_pattern_for_every_layer_leaves_out_what_is_refused():
  ready = Ready(Normed("WeightNorm"), vera(RANK), [".*"], X)
  ready.check()
