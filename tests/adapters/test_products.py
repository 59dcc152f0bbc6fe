"""Every plan is the same function; the cheapest is chosen by counted FLOPs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters import products as contraction
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

METHODS = {
  "vera": vera,
  "vera d": lambda rank, **kwargs: vera(rank, train="d", **kwargs),
  "vera b": lambda rank, **kwargs: vera(rank, train="b", **kwargs),
  "lora": lora,
}
PLANS = [
  (method, plan)
  for method in METHODS
  for plan in ("folded", "mixed")
  if (method, plan) != ("lora", "mixed")
]
# A product of eight bits of mantissa against one of another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


class Attention(nn.Module):
  """Two adapted products on one input, and one on what comes of them."""

  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    types = {"dtype": self.dtype, "param_dtype": self.dtype}
    query = nn.Dense(12, name="query", **types)(x)
    value = nn.DenseGeneral((3, 4), name="value", **types)(x)
    mixed = jnp.tanh(query) * value.reshape(query.shape)
    return nn.Dense(2, use_bias=False, name="out", **types)(mixed)


def value_and_gradients(method, dtype, lead, variables=None):
  """Outputs; gradients of all parameters and of x; the variables used."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(*lead, 8)), dtype)
  model = adapt(Attention(dtype), method, targets=["query", "value", "out"])
  if variables is None:
    variables = model.init(jax.random.key(0), x)
    variables["params"] = jax.tree.map(
      lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
      variables["params"],
    )

  def total(params, x):
    y = model.apply({**variables, "params": params}, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  grad = jax.grad(total, argnums=(0, 1), has_aux=True)
  grads, y = jax.jit(grad)(variables["params"], x)
  return y, grads, variables


def assert_close(got, want, tolerance):
  """Within a share of the largest value of each array."""
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert one.shape == two.shape and one.dtype == two.dtype
    one, two = np.float32(one), np.float32(two)
    np.testing.assert_allclose(
      one, two, rtol=0, atol=tolerance * np.abs(two).max()
    )


@pytest.mark.parametrize(
  ("dtype", "lead"),
  [("float32", (2, 3)), ("bfloat16", (5,))],
  ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_plans_agree_in_value_and_gradient(name, plan, dtype, lead):
  """In every parameter, frozen kernels too, and in the input."""
  make = METHODS[name]
  y, grads, variables = value_and_gradients(
    make(6, plan="factored"), dtype, lead
  )
  got, got_grads, _ = value_and_gradients(
    make(6, plan=plan), dtype, lead, variables
  )
  assert_close(got, y, TOLERANCE[dtype])
  assert_close(got_grads, grads, TOLERANCE[dtype])


@pytest.mark.parametrize("plan", ["folded", "mixed"])
def test_plans_agree_under_vmap_and_remat(plan):
  """A member's vectors on a leading axis; the base has none."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)

  def gradients(plan):
    model = adapt(
      nn.remat(Attention)(), vera(6, plan=plan), targets=["query", "value"]
    )
    variables = model.init(jax.random.key(0), x[0])
    params = variables["params"]

    def loss(scale, x):
      scaled = jax.tree.map_with_path(
        lambda path, leaf: (
          (leaf + 0.1) * scale if path[-1].key.startswith("vera") else leaf
        ),
        params,
      )
      return jnp.sum(model.apply({**variables, "params": scaled}, x) ** 2)

    return jax.jit(jax.vmap(jax.value_and_grad(loss)))(jnp.arange(1.0, 4.0), x)

  assert_close(gradients(plan), gradients("factored"), 2e-5)


TOKENS, RANK, INPUTS, OUTPUTS = 96, 64, 160, 192


def compiled_flops(plan, layers=1):
  """Of a step through adapted layers on one x: gradients of leaves and x."""
  method = vera(RANK, plan=plan)

  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  leaves = {"vera_d": shape(RANK), "vera_b": shape(OUTPUTS)}
  projections = {"A": shape(RANK, INPUTS), "B": shape(OUTPUTS, RANK)}
  trained = [leaves] * layers, shape(TOKENS, INPUTS)
  kernels = [shape(INPUTS, OUTPUTS)] * layers

  def loss(trained, projections, kernels):
    return sum(
      jnp.sum(
        method.forward(own, projections, trained[1], kernel, outputs=OUTPUTS)
        ** 2
      )
      for own, kernel in zip(trained[0], kernels, strict=True)
    )

  step = jax.jit(jax.grad(loss)).lower(trained, projections, kernels)
  return step.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("plan", contraction.PLANS)
def test_counted_costs_are_the_compiled_ones(plan):
  """Within 5 %: XLA also counts what is no product."""
  delta = contraction.costs(TOKENS, RANK, INPUTS, OUTPUTS)[plan]
  want = 2 * (delta + 2 * TOKENS * INPUTS * OUTPUTS)
  assert compiled_flops(plan) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("plan", ["factored", "mixed"])
def test_layers_on_one_input_share_a_x(plan):
  """Two layers cost one product A x less than twice one layer."""
  saved = 2 * compiled_flops(plan) - compiled_flops(plan, layers=2)
  assert saved == pytest.approx(2 * TOKENS * RANK * INPUTS, rel=0.05)


def test_the_cheapest_is_chosen():
  """By tokens: none to spare for a kernel, then some, then plenty."""
  base = {"rank": 1024, "inputs": 768, "outputs": 768}
  chosen = [contraction.choose(n, **base) for n in (128, 512, 8192)]
  assert chosen == ["factored", "mixed", "folded"]
  # remat runs the forward pass twice, where factored pays most of its cost
  assert contraction.choose(256, **base, forwards=2) != "mixed"
  for tokens in (64, 500, 3000):
    priced = contraction.costs(tokens, **base)
    assert priced[contraction.choose(tokens, **base)] == min(priced.values())


def test_lora_folds_a_high_rank_only():
  low, high = lora(8), lora(512)
  assert low.plan(8192, 768, 768) == "factored"
  assert high.plan(8192, 768, 768) == "folded"


@pytest.mark.parametrize("make", [vera, lora])
def test_an_unknown_plan_is_refused(make):
  with pytest.raises(UserError, match="choose auto, factored"):
    make(4, plan="fast")


def test_lora_has_no_mixed_plan():
  with pytest.raises(UserError, match="no mixed plan"):
    lora(4, plan="mixed")
