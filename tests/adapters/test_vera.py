"""VeRA: equation 2, its gradients, its leaves and their number."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

from tests.slow import rest_is_slow
from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Site, Target
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier, BertConfig

TINY = BertConfig.from_dict(
  {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
  }
)
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


class Layers(nn.Module):
  """A wide layer and a narrow one under the same pair."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    types = {"dtype": self.dtype, "param_dtype": self.dtype}
    x = jnp.tanh(nn.Dense(5, name="up", **types)(x))
    return nn.Dense(2, name="down", **types)(x)


def numpy_delta(A, B, d, b, x):
  """b * (B (d * (A x))) for one vector x, as section 3 writes it."""
  m, n = len(b), len(x)
  return np.diag(b) @ B[:m] @ np.diag(d) @ A[:, :n] @ x


@pytest.mark.smoke
@pytest.mark.parametrize("train", ["both", "d", "b"])
def test_equation_2(train):
  rng = np.random.default_rng(0)
  A, B = rng.normal(size=(6, 5)), rng.normal(size=(4, 6))
  d, b = rng.normal(size=6), rng.normal(size=3)
  x = rng.normal(size=(2, 3))
  leaves = {"vera_d": d, "vera_b": b}
  if train != "both":
    del leaves[{"d": "vera_b", "b": "vera_d"}[train]]
    d, b = (d, np.ones(3)) if train == "d" else (np.full(6, 0.25), b)
  leaves, projections, inputs = jax.tree.map(
    lambda a: jnp.asarray(a, jnp.float32), (leaves, {"A": A, "B": B}, x)
  )
  want = np.stack([numpy_delta(A, B, d, b, row) for row in x])
  method = vera(6, d_init=0.25, train=train)
  site = Site(("layer",), 3, 3, lambda: jnp.zeros((3, 3)), shared=projections)
  got, _ = adapted_product(method, leaves, site, inputs, plan="factored")
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  kernel, _ = method.weights(leaves, site)
  np.testing.assert_allclose(x @ kernel, want, rtol=1e-5, atol=1e-5)


def numeric_gradient(f, flat, eps=1e-6):
  steps = eps * jnp.eye(len(flat), dtype=flat.dtype)
  return jax.vmap(lambda e: (f(flat + e) - f(flat - e)) / (2 * eps))(steps)


@pytest.mark.parametrize(
  "method",
  rest_is_slow([vera(3), lora(2, alpha=3.0)]),
  ids=["vera", "lora"],
)
def test_gradients_against_finite_differences(method):
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    x = jnp.asarray(rng.normal(size=(3, 4)))
    model = adapt(Layers(jnp.float64), method, targets=["up", "down"])
    variables = jax.jit(model.init)(jax.random.key(0), x)
    flat, unravel = ravel_pytree(
      {
        path: jnp.asarray(rng.normal(size=leaf.shape))
        for path, leaf in flatten_dict(variables["params"], sep="/").items()
        if method.owns(path.split("/")[-1])
      }
    )

    def loss(flat):
      params = flatten_dict(variables["params"], sep="/") | unravel(flat)
      tree = {"up": {}, "down": {}}
      for path, leaf in params.items():
        layer, name = path.split("/")
        tree[layer][name] = leaf
      y = model.apply({**variables, "params": tree}, x)
      return jnp.sum(jnp.sin(y))

    got = jax.jit(jax.grad(loss))(flat)
    want = jax.jit(lambda flat: numeric_gradient(loss, flat))(flat)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
    assert jnp.abs(want).min() > 1e-6


def test_the_leaves_are_float32_even_under_x64():
  """The projections too: their digest must not depend on a global setting."""
  with jax.enable_x64(True):
    for init in ("kaiming_uniform", "kaiming_normal", "peft"):
      model = adapt(Layers(), vera(3, init=init), targets=["up"])
      x = jnp.ones((1, 4))
      variables = jax.eval_shape(model.init, jax.random.key(0), x)
      types = jax.tree.map(lambda leaf: leaf.dtype.name, variables)
      leaves = types["params"]["up"]
      assert (leaves["vera_d"], leaves["vera_b"]) == ("float32",) * 2
      assert types["projections"] == {"A": "float32", "B": "float32"}


@pytest.mark.parametrize("method", [vera(3), lora(2)], ids=["vera", "lora"])
def test_half_precision_computes_and_trains_in_float32(method):
  model = adapt(Layers(jnp.bfloat16), method, targets=["up", "down"])
  x = jnp.ones((3, 4), jnp.bfloat16)
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def loss(params):
    y = model.apply({**variables, "params": params}, x)
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y.astype(jnp.float32))

  grads = flatten_dict(jax.jit(jax.grad(loss))(variables["params"]))
  for path, grad in grads.items():
    ours = method.owns(path[-1])
    assert grad.dtype == (jnp.float32 if ours else jnp.bfloat16), path
  moved = "vera_b" if method.name == "vera" else "lora_B"
  assert jnp.abs(grads["down", moved]).max() > 0


def test_the_parameter_tree():
  """A seed and two vectors per layer; nothing else joins the parameters."""
  base = BertClassifier(TINY, 3)
  model = adapt(base, vera(4), targets=["query", "intermediate/dense"])
  shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
  own = flatten_dict(
    jax.eval_shape(base.init, jax.random.key(0), IDS)["params"], sep="/"
  )
  params = flatten_dict(shapes["params"], sep="/")
  assert {k: v.shape for k, v in params.items() if k not in own} == {
    "encoder/layer/attention/self/query/vera_b": (2, 8),
    "encoder/layer/attention/self/query/vera_d": (2, 4),
    "encoder/layer/intermediate/dense/vera_b": (2, 12),
    "encoder/layer/intermediate/dense/vera_d": (2, 4),
    "encoder/layer_2/attention/self/query/vera_b": (8,),
    "encoder/layer_2/attention/self/query/vera_d": (4,),
    "encoder/layer_2/intermediate/dense/vera_b": (12,),
    "encoder/layer_2/intermediate/dense/vera_d": (4,),
  }
  assert {k: v.shape for k, v in params.items() if k in own} == {
    k: v.shape for k, v in own.items()
  }
  assert {k: v.shape for k, v in shapes["projections"].items()} == {
    "A": (4, 8),
    "B": (12, 4),
  }
  assert set(shapes) == {"params", "projections"}


@pytest.mark.parametrize("train", ["both", "d", "b"])
def test_where_the_vectors_start(train):
  site = Site(("layer",), 8, 3, lambda: jnp.zeros((8, 3)))
  values = vera(4, d_init=1e-7, train=train).init(jax.random.key(0), site)
  start = 0.0 if train == "d" else 1e-7
  want = {"vera_d": np.full(4, start), "vera_b": np.zeros(3)}
  if train != "both":
    want = {f"vera_{train}": want[f"vera_{train}"]}
  assert values.keys() == want.keys()
  for name, value in values.items():
    np.testing.assert_allclose(value, want[name], rtol=1e-6)


def encoder(layers, width):
  """Query and value of every layer, as one scanned stack has them."""
  return {
    (name,): Target(width, width, (layers,)) for name in ("query", "value")
  }


LLAMA_7B = {
  **{(f"attention_{i}",): Target(4096, 4096, (32,)) for i in range(4)},
  **{(name,): Target(4096, 11008, (32,)) for name in ("gate", "up")},
  ("down",): Target(11008, 4096, (32,)),
}


@pytest.mark.parametrize(
  "method, targets, count",
  [
    (vera(1024), encoder(12, 768), 43_008),
    (vera(512), encoder(12, 768), 30_720),
    (vera(256), encoder(24, 1024), 61_440),
    (vera(1024), LLAMA_7B, 1_589_248),
    (vera(256), LLAMA_7B, 1_417_216),
    (vera(16), encoder(96, 12288), 2_362_368),
    (vera(256, train="b"), encoder(12, 768), 24 * 768),
    (vera(256, train="d"), encoder(12, 768), 24 * 256),
    (lora(8), encoder(12, 768), 294_912),
    (lora(16), encoder(96, 12288), 75_497_472),
  ],
)
def test_the_papers_counts(method, targets, count):
  """Tables 1 to 4. Table 1 prints 2.8M for GPT-3; its formula gives 2.36M."""
  assert adapter_size(method, targets) == count


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"rank": 0}, "rank"),
    ({"train": "a"}, "train"),
    ({"init": "zeros"}, "kaiming_uniform"),
    ({"sharing": "none"}, "shared"),
  ],
)
def test_wrong_settings_are_refused(settings, word):
  with pytest.raises(UserError, match=word):
    adapt(Layers(), vera(**settings), targets=["up"]).init(
      jax.random.key(0), jnp.ones((1, 4))
    )
