"""Every plan is the same function; the cheapest is chosen by counted FLOPs."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import rest_is_slow
from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.interface import PLANS, LowRank, Site
from vera_jax.adapters.lora import lora, lora_fa
from vera_jax.adapters.magnitude import dvora
from vera_jax.adapters.plans import Split, check_plan, choose, costs
from vera_jax.adapters.projections import make_pair
from vera_jax.adapters.randlora import randlora
from vera_jax.adapters.sites import arrays_at
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

METHODS = {
  "vera": vera(6),
  "vera d": vera(6, train="d"),
  "vera b": vera(6, train="b"),
  "lora": lora(6),
}
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
    both = jnp.tanh(query) * value.reshape(query.shape)
    return nn.Dense(2, use_bias=False, name="out", **types)(both)


@cache
def value_and_gradients(name, dtype, plan):
  """Outputs; gradients of all parameters, frozen kernels too, and of x."""
  rng = np.random.default_rng(0)
  lead = (2, 3) if dtype == "float32" else (5,)
  x = jnp.asarray(rng.normal(size=(*lead, 8)), dtype)
  model = adapt(
    Attention(dtype),
    METHODS[name],
    targets=["query", "value", "out"],
    plan=plan,
  )
  variables = model.init(jax.random.key(0), x)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    variables["params"],
  )

  def total(params, x):
    y = model.apply({**variables, "params": params}, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  grads, y = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)
  return y, grads


def assert_close(got, want, tolerance):
  """Within a share of the largest value of each array."""
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert one.shape == two.shape and one.dtype == two.dtype
    one, two = np.float32(one), np.float32(two)
    np.testing.assert_allclose(
      one, two, rtol=0, atol=tolerance * np.abs(two).max()
    )


@pytest.mark.parametrize(
  "name, dtype, plan",
  rest_is_slow(
    [
      ("vera", "float32", "folded"),
      ("vera", "float32", "folded_forward"),
      ("lora", "float32", "folded"),
      ("vera d", "float32", "folded_forward"),
      ("vera b", "float32", "folded_forward"),
      ("vera", "bfloat16", "folded"),
      ("vera", "bfloat16", "folded_forward"),
      ("lora", "bfloat16", "folded"),
    ],
    quick=3,
  ),
)
def test_plans_agree_in_value_and_gradient(name, dtype, plan):
  got = value_and_gradients(name, dtype, plan)
  want = value_and_gradients(name, dtype, "factored")
  assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.slow
def test_plans_agree_under_vmap_and_remat():
  """Each run's vectors on a leading axis, which the base has not."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)

  def gradients(plan):
    model = adapt(
      nn.remat(Attention)(), vera(6), targets=["query", "value"], plan=plan
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

  want = gradients("factored")
  for plan in ("folded", "folded_forward"):
    assert_close(gradients(plan), want, 2e-5)


TOKENS, RANK, INPUTS, OUTPUTS = 96, 64, 160, 192


LAYER = Site(("layer",), INPUTS, OUTPUTS, lambda: jnp.zeros((INPUTS, OUTPUTS)))
PRICED = {
  "vera": vera(RANK),
  "lora": lora(RANK),
  "lora_fa": lora_fa(RANK),
  "randlora": randlora(8, alpha=8.0),
}


@cache
def shapes_of(name):
  """A method's leaves and projections on the layer."""
  method = PRICED[name]

  def make():
    made = method.shared({LAYER.path: LAYER}) if method.shared else {}
    shared = {**arrays_at(made), **arrays_at(made, LAYER.path)}
    return method.init(jax.random.key(0), LAYER), shared

  return jax.eval_shape(make)


@cache
def compiled_flops(plan, name="vera", layers=1):
  """Of a step through adapted layers on one x: gradients of leaves and x."""
  leaves, projections = shapes_of(name)

  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  trained = [leaves] * layers, shape(TOKENS, INPUTS)
  kernels = [shape(INPUTS, OUTPUTS)] * layers

  def loss(trained, projections, kernels):
    all_leaves, x = trained
    total = 0.0
    for own, kernel in zip(all_leaves, kernels, strict=True):
      site = LAYER._replace(kernel=lambda k=kernel: k, shared=projections)
      y, _ = adapted_product(PRICED[name], own, site, x, plan=plan)
      total += jnp.sum(y**2)
    return total

  step = jax.jit(jax.grad(loss)).lower(trained, projections, kernels)
  return step.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  "name, plan",
  rest_is_slow(
    [
      *(("vera", plan) for plan in PLANS),
      *(
        (name, plan) for name in PRICED for plan in PLANS[:2] if name != "vera"
      ),
      ("lora_fa", "folded_forward"),
    ],
    quick=3,
  ),
)
def test_counted_costs_are_the_compiled_ones(name, plan):
  """Within 5 %: XLA also counts what is no product."""
  priced = []

  def price(leaves, shared):
    found = PRICED[name].low_rank(leaves, LAYER._replace(shared=shared))
    priced.append(costs(TOKENS, found)[plan])

  jax.eval_shape(price, *shapes_of(name))
  want = 2 * (priced[0] + 2 * TOKENS * INPUTS * OUTPUTS)
  assert compiled_flops(plan, name) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("plan", ["factored", "folded_forward"])
def test_layers_on_one_input_share_a_x(plan):
  """Two layers cost one product A x less than twice one layer."""
  saved = 2 * compiled_flops(plan) - compiled_flops(plan, layers=2)
  assert saved == pytest.approx(2 * TOKENS * RANK * INPUTS, rel=0.05)


def factors(rank, inputs=768, outputs=768, *, trains_down=False):
  down, up = jnp.zeros((inputs, rank)), jnp.zeros((rank, outputs))
  if trains_down:
    return LowRank(down, up, trains_down=True, trains_up=True)
  return LowRank(down, up, inner=jnp.ones(rank))


def test_the_cheapest_is_chosen():
  """By tokens: none to spare for a kernel, then some, then plenty."""
  vera_1024 = factors(1024)
  chosen = [choose(tokens, vera_1024) for tokens in (128, 512, 8192)]
  assert chosen == ["factored", "folded_forward", "folded"]
  # remat runs the forward pass twice, where factored pays most of its cost
  assert choose(256, vera_1024, forwards=2) != "folded_forward"
  for tokens in (64, 500, 3000):
    priced = costs(tokens, vera_1024)
    assert priced[choose(tokens, vera_1024)] == min(priced.values())


def test_lora_folds_a_high_rank_only():
  low, high = (factors(rank, trains_down=True) for rank in (8, 512))
  assert choose(8192, low) == "factored"
  assert choose(8192, high) == "folded"


def test_names_of_plans():
  assert check_plan("folded_forward") == "folded_forward"
  with pytest.raises(UserError, match="'fast'; choose auto, factored"):
    adapt(Attention(), vera(4), targets=["out"], plan="fast")


def test_trained_matrices_have_no_folded_forward_plan():
  with pytest.raises(UserError, match="plan for key: its delta's first"):
    trained = factors(4, trains_down=True)
    choose(8, trained, plan="folded_forward", path=("key",))


@pytest.mark.parametrize(
  "dtype, size, in_output, in_gradient",
  [
    ("float32", 1e-3, (0, 1e-3), 1e-4),
    ("bfloat16", 1e-3, (0.5, np.inf), 0.02),
    ("bfloat16", 1e-2, (0.13, 0.3), 0.02),
    ("bfloat16", 0.1, (0.015, 0.033), 0.02),
  ],
)
def test_what_is_left_of_a_small_delta(dtype, size, in_output, in_gradient):
  """By every plan, at `size` times W0's norm, as docs/performance.md says.

  In bfloat16 the sum of both has eight bits of mantissa. The gradients are
  right nevertheless.
  """
  rng = np.random.default_rng(0)
  w0, x, g = (
    rng.normal(size=shape) for shape in ((32, 32), (64, 32), (64, 32))
  )
  a, b_matrix = rng.normal(size=(16, 32)), rng.normal(size=(32, 16))
  d, b = np.full(16, 0.1), rng.normal(size=32)
  b *= size * np.linalg.norm(w0) / np.linalg.norm(a.T * d @ b_matrix.T * b)
  leaves = {"vera_d": jnp.float32(d), "vera_b": jnp.float32(b)}
  shared = {"A": jnp.float32(a), "B": jnp.float32(b_matrix)}
  kernel, rows = jnp.asarray(w0, dtype), jnp.asarray(x, dtype)
  site = Site((), 32, 32, lambda: kernel, shared=shared)

  def loss(leaves, plan):
    y, _ = adapted_product(METHODS["vera"], leaves, site, rows, plan=plan)
    return jnp.sum(y.astype(jnp.float32) * jnp.float32(g)), y

  @jax.jit
  def by_plan(leaves):
    both = jax.value_and_grad(loss, has_aux=True)
    return {plan: both(leaves, plan) for plan in PLANS}, rows @ kernel

  def error(got, want):
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)

  thin = np.float64(rows) @ a.T
  want = {
    "vera_d": np.einsum("tr,to,or,o->r", thin, g, b_matrix, b),
    "vera_b": np.sum(thin * d @ b_matrix.T * g, axis=0),
  }
  results, unadapted = by_plan(leaves)
  lowest, highest = in_output
  for plan, ((_, y), gradients) in results.items():
    added = np.float64(y) - np.float64(unadapted)
    lost = error(added, thin * d @ b_matrix.T * b)
    assert lowest <= lost <= highest, plan
    for name, gradient in want.items():
      assert error(gradients[name], gradient) <= in_gradient, (plan, name)


@pytest.mark.parametrize("plan", ["folded", "folded_forward"])
@pytest.mark.slow
def test_a_magnitudes_norm_needs_no_delta_of_its_own(plan):
  """Its kernel is the one that the product is made with."""
  rank, width = 256, 48
  x = jnp.ones((512, width))
  pair = make_pair(rank, width, width)
  W0 = jnp.ones((width, width))
  site = Site(("layer",), width, width, lambda: W0, shared=pair)
  counts = {}
  for method in (vera(rank), dvora(rank)):
    leaves = method.init(jax.random.key(0), site)

    def loss(leaves, method=method):
      y, _ = adapted_product(method, leaves, site, x, plan=plan)
      return jnp.sum(jnp.sin(y))

    compiled = jax.jit(jax.grad(loss)).lower(leaves).compile()
    counts[method.name] = compiled.cost_analysis()["flops"]
  more = counts["vera+magnitude"] - counts["vera"]
  assert 0 < more < rank * width * width  # half of a product that forms it


@pytest.mark.smoke
def test_a_plan_is_priced_by_what_a_device_computes():
  """A fold is shared by the devices that store the kernel, its gradient is
  not; and `tensor` divides products."""

  def check(down, up, inner):
    factors = LowRank(down, up, inner=inner)
    pick = partial(choose, 2048, factors, forwards=2)
    assert pick() == "factored"
    assert pick(split=Split(fsdp=256)) == "folded_forward"
    whole = costs(2048, factors, forwards=2)
    fsdp = costs(2048, factors, forwards=2, split=Split(fsdp=256))
    tensor = costs(2048, factors, split=Split(8, 1, 8))
    assert fsdp["factored"] == whole["factored"]
    build, thin = 8192 * 1024 * 28672, 2048 * 8192 * 1024
    assert whole["folded"] - fsdp["folded"] == 2 * build * 255 / 256
    wide = 2048 * 1024 * 28672
    assert tensor["folded_forward"] == build / 64 + (thin + wide) / 8

  sizes = (8192, 1024), (1024, 28672), (1024,)
  shapes = (jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)
  jax.eval_shape(check, *shapes)  # only the shapes are read
