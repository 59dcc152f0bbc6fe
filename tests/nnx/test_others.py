"""Layers as other libraries write them: adapted, or refused by name.

Those of tunix are its own; others are written here with the same fields and the
same call.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vera_jax
import vera_jax.nnx
from tests.nnx.test_adapt import move
from vera_jax.errors import UserError
from vera_jax.nnx.adapt import modules_of
from vera_jax.nnx.layers import see

X = jnp.cos(jnp.arange(2.0 * 3 * 8)).reshape(2, 3, 8)
HEADS = jnp.sin(jnp.arange(2.0 * 3 * 2 * 4)).reshape(2, 3, 2, 4)


def normal(*shape):
  return nnx.Param(0.3 * jax.random.normal(jax.random.key(len(shape)), shape))


class Einsum(nnx.Module):
  """As tunix's and Gemma's; Gemma 4's multiplies w by a number first."""

  def __init__(self, einsum_str, shape, w_scale=None):
    self.einsum_str = einsum_str
    self.shape = shape
    self.w_scale = w_scale
    self.w = normal(*shape)

  def __call__(self, x):
    w = self.w[...]
    if self.w_scale is not None:
      w = w * self.w_scale
    return jnp.einsum(self.einsum_str, x, w)


class Dense(nnx.Module):
  """As bonsai's `ShardedLinear`."""

  def __init__(self, inputs, outputs, *, use_bias=True):
    self.kernel = normal(inputs, outputs)
    self.bias = normal(outputs) if use_bias else None

  def __call__(self, x, *, out_sharding=None):
    y = jnp.matmul(x, self.kernel[...])
    return y if self.bias is None else y + self.bias[...][None, None]


class Turned(Dense):
  """Of a kernel that has the outputs first."""

  def __call__(self, x):
    return x @ self.kernel[...].T


class Embedder(nnx.Module):
  def __init__(self):
    self.input_embedding = normal(11, 8)

  def decode(self, x):
    return jnp.dot(x, self.input_embedding[...].T)


class Experts(nnx.Module):
  """As Qwen 3's mixture of experts: a kernel for each expert."""

  def __init__(self):
    self.gate_proj, self.down_proj = normal(2, 8, 4), normal(2, 4, 8)

  def __call__(self, x):
    inner = jnp.einsum("btd,edf->btef", x, self.gate_proj[...])
    return jnp.einsum("btef,efd->btd", inner, self.down_proj[...])


class Model(nnx.Module):
  def __init__(self, layer):
    self.layer = layer

  def __call__(self, x, **kwargs):
    return self.layer(x, **kwargs)


ADAPTED = {
  "q": (lambda: Einsum("BTD,NDH->BTNH", (2, 8, 4)), X),
  "q, inputs first": (lambda: Einsum("BTD,DNH->BTNH", (8, 2, 4)), X),
  "o": (lambda: Einsum("BTNH,NHD->BTD", (2, 4, 8)), HEADS),
  "kv in one": (lambda: Einsum("BSD,CKDH->CBSKH", (2, 2, 8, 4)), X),
  "qkv in one": (lambda: Einsum("BTD,SNDH->SBTNH", (3, 2, 8, 4)), X),
  "dots": (lambda: Einsum("...TM,MD->...TD", (8, 5)), X),
  "scaled": (lambda: Einsum("BTD,DNP->BTNP", (8, 2, 4), 0.5), X),
  "dense": (lambda: Dense(8, 5, use_bias=False), X),
  "dense, bias": (lambda: Dense(8, 5), X),
}
METHODS = [
  vera_jax.vera(rank=16),
  pytest.param(vera_jax.vera(rank=2), marks=pytest.mark.slow),
  pytest.param(vera_jax.dora(rank=2), marks=pytest.mark.slow),
  pytest.param(vera_jax.ia3(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ADAPTED)
def test_it_is_adapted(name, method):
  make, x = ADAPTED[name]
  model = Model(make())
  base = model(x)
  vera_jax.nnx.adapt(model, method, targets=["layer"])
  np.testing.assert_allclose(model(x), base, rtol=2e-6, atol=2e-6)
  move(model)
  assert np.abs(model(x) - base).max() > 1e-3
  merged = vera_jax.nnx.merge(model)
  np.testing.assert_allclose(model(x), merged(x), rtol=2e-6, atol=2e-6)


def test_what_its_own_code_does_more_is_folded():
  for name, (make, x) in ADAPTED.items():
    model = Model(make())
    method = vera_jax.lora(rank=2)
    vera_jax.nnx.adapt(model, method, targets=["layer"], plan="factored")
    if name in ("scaled", "dense, bias"):
      with pytest.raises(UserError, match="no factored plan"):
        model(x)
    else:
      nnx.eval_shape(lambda m, x: m(x), model, x)


def test_keywords_reach_the_layer():
  model = Model(Dense(8, 5))
  vera_jax.nnx.adapt(model, vera_jax.lora(rank=2), targets=["layer"])
  assert model(X, out_sharding=None).shape == (2, 3, 5)


@pytest.mark.parametrize(
  ("layer", "why"),
  [
    (Embedder, "its class Embedder has no equation"),
    (Experts, "its class Experts has no equation"),
    (lambda: Einsum("BTD,BDH->BTH", (2, 8, 4)), "BTD,BDH->BTH.* kernel of its"),
    (lambda: Turned(5, 8), "does not return what its equation|no product"),
  ],
)
def test_it_is_refused(layer, why):
  model = Model(layer())
  with pytest.raises(UserError, match=why):
    vera_jax.nnx.adapt(model, vera_jax.lora(rank=2), targets=["layer"])
    model(X)


class Apart(nnx.Module):
  """Keys and values by kernels of their own, as Hugging Face has them."""

  def __init__(self, both):
    self.k_proj = Einsum("BSD,KDH->BSKH", (2, 8, 4))
    self.v_proj = Einsum("BSD,KDH->BSKH", (2, 8, 4))
    self.k_proj.w[...], self.v_proj.w[...] = both.w[...]

  def __call__(self, x):
    return jnp.stack([self.k_proj(x), self.v_proj(x)])


@pytest.mark.parametrize(
  "method", [vera_jax.vera(rank=2), vera_jax.vera(rank=16), vera_jax.dora()]
)
def test_gemmas_keys_and_values_are_parts(method):
  """Of one kernel (2, K, D, H), whose columns are those of k, then of v."""
  both = Model(Einsum("BSD,CKDH->CBSKH", (2, 2, 8, 4)))
  apart = Apart(both.layer)
  parts = {"layer": {"k_proj": (0, 8), "v_proj": (8, 16)}}
  names = ["k_proj", "v_proj"]
  vera_jax.nnx.adapt(both, method, targets=names, fused=parts)
  vera_jax.nnx.adapt(apart, method, targets=names)
  for name in names:
    ours, theirs = vars(both.layer)[name], vars(apart)[name]
    for leaf, variable in vars(theirs).items():
      if isinstance(variable, nnx.LoRAParam):
        vars(ours)[leaf].set_value(
          variable.get_value()
          + 0.1 * jnp.arange(variable.size).reshape(variable.shape)
        )
        variable.set_value(vars(ours)[leaf].get_value())
  np.testing.assert_allclose(both(X), apart(X), rtol=2e-6, atol=2e-6)
  merged = vera_jax.nnx.merge(both)
  np.testing.assert_allclose(merged(X), apart(X), rtol=2e-6, atol=2e-6)


MLP = {"gate_proj", "up_proj", "down_proj"}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
GEMMA = {"q_einsum", "kv_einsum", "attn_vec_einsum"}
TUNIX = {
  # family, config, layers that are adapted, classes that are refused
  "Llama3": ("llama3p2_1b", QKVO | MLP, {"Embedder"}),
  "Qwen2": ("qwen2p5_0p5b", QKVO | MLP, {"Embedder"}),
  "Qwen3": ("qwen3_0p6b", QKVO | MLP, {"Embedder"}),
  "Qwen3, experts": (
    "qwen3_30b_a3b",
    QKVO | {"router", "lm_head"},
    {"Embedder", "MoELayer"},
  ),
  "Gemma": ("gemma_2b", GEMMA | MLP, {"Embedder"}),
  "Gemma, as many heads": (
    "gemma_7b",
    {"qkv_einsum", "attn_vec_einsum"} | MLP,
    {"Embedder"},
  ),
  "Gemma3": ("gemma3_270m", GEMMA | MLP, {"Embedder"}),
  "Gemma4": (
    "gemma4_e2b",
    GEMMA
    | MLP
    | {
      "per_layer_input_gate",
      "per_layer_model_projection",
      "per_layer_projection",
    },
    {"Embedder"},
  ),
}


@pytest.mark.filterwarnings("ignore")  # of tunix's dependencies
@pytest.mark.parametrize("name", TUNIX)
def test_the_layers_of_tunix(name):
  pytest.importorskip("tunix")
  config_name, adapted, refused = TUNIX[name]
  family = name.partition(",")[0]
  module = importlib.import_module(f"tunix.models.{family.lower()}.model")
  config = getattr(module.ModelConfig, config_name)()
  config = dataclasses.replace(config, num_layers=1)
  model = nnx.eval_shape(
    lambda: getattr(module, family)(config, rngs=nnx.Rngs(0))
  )
  sites = vera_jax.nnx.find_targets(model, [".*"])
  assert {path[-1] for path in sites} == adapted
  reasons = {
    type(module).__name__
    for module in modules_of(model).values()
    if isinstance(see(module, type(module)), str)
  }
  assert reasons == refused
