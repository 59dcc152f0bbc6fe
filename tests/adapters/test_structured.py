"""The pair that is never stored: what matrix it is, and what it costs."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import rest_is_slow
from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.apply import adapt
from vera_jax.adapters.counting import plans_at
from vera_jax.adapters.interface import PLANS, Site, Target
from vera_jax.adapters.plans import costs
from vera_jax.adapters.projections import (
  digest,
  make_pair,
  make_projections,
  pair_of,
)
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.structured import blocks, draw
from vera_jax.adapters.vera import vera

KEY = jax.random.key(5)
each_plan = pytest.mark.parametrize("plan", rest_is_slow(PLANS))


@pytest.mark.parametrize(
  "width, sizes",
  [
    (1, (1,)),
    (96, (96,)),
    (768, (32, 24)),
    (11008, (128, 86)),
    (53248, (52, 32, 32)),
    (131, (12, 11)),  # a prime, padded to 132
    (50257, (103, 61, 8)),  # 29 * 1733, padded to 50264
  ],
)
def test_few_blocks_of_128_rows_at_most(width, sizes):
  assert blocks(width) == sizes


# More rows than columns, fewer, a width of odd factors, a prime, and widths of
# one block.
@pytest.mark.parametrize(
  "rows, columns",
  rest_is_slow(
    [(16, 131), (7, 30), (40, 64), (300, 144), (3, 1), (1, 5)], quick=2
  ),
)
def test_products_are_those_of_the_matrix(rows, columns):
  """Both ways round, within float32's rounding; gradients go back by it."""
  S = draw(KEY, rows, columns, variance=2 / columns)
  entries = np.asarray(S)
  assert entries.shape == S.shape == (rows, columns) == S.T.shape[::-1]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, columns)), jnp.float32)
  y = jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)

  @jax.jit
  def products(S, x, y):
    back = jax.grad(lambda x: jnp.sum(jnp.sin(x @ S.T)))(x)
    return x @ S.T, S.T @ y, y.T @ S, back, x @ S.leading(1).T

  want = (
    *(x @ entries.T, entries.T @ y, y.T @ entries),
    *(np.cos(x @ entries.T) @ entries, x @ entries[:1].T),
  )
  for found, product in zip(products(S, x, y), want, strict=True):
    np.testing.assert_allclose(found, product, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("columns", [512, 384])
def test_rows_are_orthogonal_or_columns_and_else_far_from_alike(columns):
  """Unlike a transform's first rows, which give pairs of inputs one column."""
  rows = columns // 2
  S = np.asarray(draw(KEY, rows, columns, variance=2 / columns))
  np.testing.assert_allclose(S @ S.T, 2 * np.eye(rows), atol=1e-4)
  normal = np.random.default_rng(0).normal(size=S.shape)

  def likeness(matrix):
    unit = matrix / np.linalg.norm(matrix, axis=0)
    return np.abs(unit.T @ unit - np.eye(columns)).max()

  assert likeness(S) < 1.2 * likeness(normal) < 0.5
  S = np.asarray(draw(KEY, 512, columns, variance=2 / columns))
  np.testing.assert_allclose(
    S.T @ S, 2 * 512 / columns * np.eye(columns), atol=1e-4
  )


@pytest.mark.parametrize("rank", rest_is_slow([24, 144]))
def test_second_moments_are_kaimings(rank):
  """Of each row and column over seeds; of the whole matrix for any seed."""
  sizes = {"A": (rank, 96), "B": (144, rank)}
  squares = {name: np.zeros(size) for name, size in sizes.items()}
  for seed in range(10):
    pair = make_pair(rank, 96, 144, seed=seed, init="structured")
    for name, (rows, fan_in) in sizes.items():
      entries = np.asarray(pair[name])
      squares[name] += entries**2 * fan_in / 20
      assert np.sum(entries**2) == pytest.approx(2 * rows, rel=1e-4)
  for mean in squares.values():
    np.testing.assert_allclose(mean.mean(0), 1, atol=0.4)
    np.testing.assert_allclose(mean.mean(1), 1, atol=0.4)


WIDTHS = {("up",): Target(12, 30), ("down",): Target(30, 12)}


def test_each_width_has_a_transform_of_its_own():
  """A wider layer leaves the others' alone."""
  given = {"rank": 6, "seed": 0, "init": "structured"}
  made = make_projections(WIDTHS, **given)
  assert made.keys() == {"A_12", "B_30", "A_30", "B_12"}
  wider = make_projections({**WIDTHS, ("wide",): Target(12, 700)}, **given)
  for name, matrix in made.items():
    np.testing.assert_array_equal(matrix.signs, wider[name].signs)
  assert not np.array_equal(made["A_12"].signs, made["B_12"].signs)
  bytes_kept = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
  assert bytes_kept == 2 * 2 * (12 + 30)  # two matrices of each width


def test_the_digest_is_of_what_defines_the_pair():
  given = {"rank": 6, "seed": 0, "init": "structured"}
  found = {
    digest(make_projections(WIDTHS, **{**given, **other}))
    for other in ({}, {"rank": 7}, {"seed": 1}, {"rows": 12})
  }
  assert len(found) == 4
  looped = {(f"layer_{i}", "query"): Target(12, 30) for i in range(2)}
  stacked = {("layer", "query"): Target(12, 30, (2,))}
  one, other = (
    make_projections(targets, **given, sharing="unique")
    for targets in (looped, stacked)
  )
  assert digest(one) == digest(other)
  first, second = other["layer"]["query"]["A"].signs
  assert not np.array_equal(first, second)


RANK, INPUTS, OUTPUTS, TOKENS = 64, 160, 192, 96


def site_of(method, kernel=None):
  target = Target(INPUTS, OUTPUTS)
  shared = method.shared({("layer",): target})
  return Site(("layer",), INPUTS, OUTPUTS, lambda: kernel, shared=shared)


@each_plan
def test_gradients_against_the_materialised_pair(plan):
  """In float64, within float32's rounding."""
  rng = np.random.default_rng(0)
  method = vera(RANK, init="structured")
  W0, x = rng.normal(size=(INPUTS, OUTPUTS)), rng.normal(size=(5, INPUTS))
  d, b = rng.normal(size=RANK), rng.normal(size=OUTPUTS)
  x *= 0.1
  site = site_of(method, jnp.asarray(W0, jnp.float32))
  A, B = (np.asarray(m.T, np.float64) for m in pair_of(site))
  thin = x @ A.T
  g = np.cos(x @ W0 + thin * d @ B.T * b)
  want = {
    "vera_d": np.einsum("tr,to,or,o->r", thin, g, B, b),
    "vera_b": np.sum(thin * d @ B.T * g, axis=0),
    "x": g @ (W0 + A.T * d @ B.T * b).T,
  }

  @jax.jit
  @jax.grad
  def gradients(trained):
    leaves = {k: v for k, v in trained.items() if k != "x"}
    y, _ = adapted_product(method, leaves, site, trained["x"], plan=plan)
    return jnp.sum(jnp.sin(y))

  given = {"vera_d": d, "vera_b": b, "x": x}
  found = gradients(jax.tree.map(jnp.float32, given))
  for name, gradient in want.items():
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(found[name], gradient, atol=2e-5 * scale)


@cache
def step(plan):
  """The jaxpr and the compiled FLOPs of a step on one layer."""
  method = vera(RANK, init="structured")
  site = site_of(method)
  leaves = method.init(KEY, site)

  def loss(trained, kernel, shared):
    own, x = trained
    here = site._replace(kernel=lambda: kernel, shared=shared)
    return jnp.sum(adapted_product(method, own, here, x, plan=plan)[0] ** 2)

  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  given = (leaves, shape(TOKENS, INPUTS)), shape(INPUTS, OUTPUTS), site.shared
  compiled = jax.jit(jax.grad(loss)).lower(*given).compile()
  jaxpr = jax.make_jaxpr(jax.grad(loss))(*given)
  return str(jaxpr), compiled.cost_analysis()["flops"]


@each_plan
def test_counted_costs_are_the_compiled_ones(plan):
  """Within 15 %: XLA also counts the signs and the sums."""
  site = site_of(vera(RANK, init="structured"))
  factors = vera(RANK).low_rank({}, site)
  want = 2 * (costs(TOKENS, factors)[plan] + 2 * TOKENS * INPUTS * OUTPUTS)
  assert step(plan)[1] == pytest.approx(want, rel=0.15)


def test_nothing_of_a_matrixs_size_unless_folded():
  matrices = [f"f32[{RANK},{INPUTS}]", f"f32[{INPUTS},{RANK}]"]
  matrices += [f"f32[{RANK},{OUTPUTS}]", f"f32[{OUTPUTS},{RANK}]"]
  assert not any(matrix in step("factored")[0] for matrix in matrices)
  assert any(matrix in step("folded")[0] for matrix in matrices)


def test_the_plan_is_chosen_by_its_own_costs():
  """Dense matrices would be folded; few rows are multiplied as a matrix."""
  target, tokens = {("layer",): Target(768, 768)}, {("layer",): 8192}
  for init, plan in (("kaiming_uniform", "folded"), ("structured", "factored")):
    found = plans_at(vera(1024, init=init), target, tokens)
    assert found == {("layer",): plan}
  structured = vera(1024, init="structured")
  shared = jax.eval_shape(lambda: structured.shared(target))
  site = Site(("layer",), 768, 768, lambda: None, shared=shared)
  price = costs(1, structured.low_rank({}, site))["factored"]
  assert price == 2 * 2 * 1024 * (32 + 32)
  S = draw(KEY, 8, 768, variance=1.0)
  assert S.cost(1) == 768 * (32 + 24)
  assert 8 * 768 * 1000 < S.cost(1000) < 1.1 * 8 * 768 * 1000
  x = jnp.ones((1000, 768))
  jaxpr = str(jax.make_jaxpr(lambda x: x @ S.T)(x))
  assert "f32[1000,32,24]" not in jaxpr and "f32[8,768]" in jaxpr


def test_bfloat16_is_as_near_as_a_stored_pair():
  """A product's error, of its length, within twice the dense one's."""
  method = vera(RANK, init="structured")
  site = site_of(method)
  rng = np.random.default_rng(0)
  for matrix in pair_of(site):
    x = jnp.asarray(rng.normal(size=(50, matrix.shape[0])), jnp.bfloat16)
    entries = np.asarray(matrix)
    want = np.float64(x) @ entries
    errors = [
      np.linalg.norm(np.float64(y) - want)
      for y in (
        jax.jit(lambda x, m: x @ m)(x, matrix),
        x @ jnp.asarray(entries, jnp.bfloat16),
      )
    ]
    assert errors[0] < 2.5 * errors[1] < 0.02 * np.linalg.norm(want)


def test_pvera_takes_the_first_half_of_its_rows():
  method = pvera(RANK, init="structured")
  site = site_of(method, np.zeros((INPUTS, OUTPUTS), np.float32))
  leaves = {
    "pvera_d": np.full(2 * RANK, 0.1, np.float32),
    "pvera_b": np.ones(OUTPUTS, np.float32),
  }
  x = np.random.default_rng(0).normal(size=(4, INPUTS)).astype(np.float32)
  A, B = (np.asarray(m.T) for m in pair_of(site))
  assert A.shape == (2 * RANK, INPUTS)
  want = 0.1 * x @ A[:RANK].T @ B.T

  @jax.jit
  def products(leaves, x):
    return (
      adapted_product(method, leaves, site, x)[0],
      method.forward(leaves, site, x, None, lambda x: jnp.zeros(()))[0],
      x @ method.weights(leaves, site)[0],
    )

  for y in products(leaves, jnp.asarray(x)):
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_a_network_with_parts_of_other_widths(x):
  """`adapt` finds each site's transform by its widths, fused parts too."""
  from tests.adapters.conftest import Net

  fused = {"fused": {"query": (0, 8), "value": (8, 24)}}
  module = adapt(
    Net("scanned"),
    vera(3, init="structured"),
    targets=("query", "value", "heads"),
    fused=fused,
  )
  made = jax.eval_shape(module.init, KEY, x)["projections"]
  assert made.keys() == {"A_8", "B_8", "B_16"}
