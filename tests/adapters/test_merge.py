"""Two roads, one answer: the adapted forward and the merged kernels."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.lora import lora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.projections import INITIALISERS
from vera_jax.adapters.vera import vera

DEPTH = 2
TARGETS = ("query", "out", "up", "down")
STACKS = ("looped", "scanned", "looped remat", "scanned remat")
METHODS = {
  "vera": vera(5),
  "vera unique": vera(5, sharing="unique"),
  "vera d": vera(5, train="d"),
  "vera b": vera(5, train="b"),
  "lora": lora(2, alpha=3.0),
  # The first is what "vera" has.
  **{init: vera(8, init=init) for init in INITIALISERS[1:]},
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 7)), "float32")


class Block(nn.Module):
  """Split heads out and in, then two layers of other shapes."""

  @nn.compact
  def __call__(self, x):
    y = nn.DenseGeneral((2, 3), name="query")(x)
    y = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(jnp.tanh(y))
    y = nn.Dense(9, use_bias=False, name="up")(jnp.tanh(x + y))
    return x + nn.Dense(x.shape[-1], name="down")(jnp.tanh(y)), None


class Stack(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    scan, block = "scanned" in self.kind, Block
    if "remat" in self.kind:
      block = nn.remat(block, prevent_cse=not scan)
    if scan:
      axes = {"variable_axes": {True: 0}, "split_rngs": {True: True}}
      return nn.scan(block, **axes, length=DEPTH)(name="layer")(x)[0]
    for index in range(DEPTH):
      x, _ = block(name=f"layer_{index}")(x)
    return x


class Reversed(nn.Module):
  """Contracts two axes that it names from the last to the first."""

  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral(5, axis=(-1, -2), name="layer")(x)


@partial(jax.jit, static_argnums=0)
def run(model, variables):
  return model.apply(variables, X)


@cache
def start(model):
  return jax.jit(model.init)(jax.random.key(2), X)


def is_adapter(path):
  return path[-1].startswith(("vera", "lora"))


def randomise(params):
  """The tree with its adapter's leaves away from where they start."""
  rng = np.random.default_rng(1)
  flat = flatten_dict(params)
  for path in filter(is_adapter, sorted(flat)):
    noise = 0.5 * rng.standard_normal(flat[path].shape)
    flat[path] = jnp.asarray(noise, jnp.float32)
  return unflatten_dict(flat)


def base_of(params):
  """The tree without the adapter's leaves."""
  flat = flatten_dict(params)
  return unflatten_dict({p: x for p, x in flat.items() if not is_adapter(p)})


def unstack(tree):
  """A scanned tree as the looped stack names it."""
  return {
    f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layer"])
    for i in range(DEPTH)
  }


def check(model, variables):
  """Identity at the start; adapted equals merged, and not the base."""
  base = base_of(variables["params"])
  want = run(model.model, {"params": base})
  np.testing.assert_array_equal(run(model, variables), want)

  params = randomise(variables["params"])
  merged = merge(
    params,
    variables.get("projections", {}),
    adapter=model.adapter,
    targets=model.find_targets(X),
  )
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
  got = run(model, {**variables, "params": params})
  np.testing.assert_allclose(
    run(model.model, {"params": merged}), got, atol=1e-5, rtol=1e-5
  )
  assert jnp.abs(got - want).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_adapted_equals_merged_when_scanned(method):
  model = adapt(Stack("scanned"), METHODS[method], targets=TARGETS)
  check(model, start(model))


@pytest.mark.parametrize("method", ["vera", "vera unique", "lora"])
@pytest.mark.parametrize("stack", sorted({*STACKS} - {"scanned"}))
def test_adapted_equals_merged_in_other_stacks(stack, method):
  """The leaves are the scanned stack's, and so are the outputs."""
  scanned = adapt(Stack("scanned"), METHODS[method], targets=TARGETS)
  variables = start(scanned)
  stacked = {**variables, "params": randomise(variables["params"])}
  model = adapt(Stack(stack), METHODS[method], targets=TARGETS)
  own = jax.eval_shape(model.init, jax.random.key(2), X)
  if "looped" in stack:
    variables = {
      name: unstack(tree) if "layer" in tree else tree
      for name, tree in variables.items()
    }
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, own)
  check(model, variables)
  params = stacked["params"]
  params = unstack(params) if "looped" in stack else params
  np.testing.assert_allclose(
    run(model, {**variables, "params": params}),
    run(scanned, stacked),
    atol=1e-5,
    rtol=1e-5,
  )


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["vera", "vera unique", "lora"])
def test_axes_named_out_of_order(method):
  model = adapt(Reversed(), METHODS[method], targets=["layer"])
  check(model, start(model))


def test_a_pair_a_layer_is_the_same_scanned_and_looped():
  adapter = METHODS["vera unique"]
  scanned, looped = (
    adapter.projections(
      adapt(Stack(kind), adapter, targets=TARGETS).find_targets(X)
    )
    for kind in ("scanned", "looped")
  )
  jax.tree.map(np.testing.assert_array_equal, unstack(scanned), looped)
  first, second = (looped[f"layer_{i}"]["up"]["A"] for i in range(2))
  assert np.abs(first - second).max() > 0.1
  query, down = scanned["layer"]["query"]["B"], scanned["layer"]["down"]["B"]
  assert np.abs(query - down[:, :6]).max() > 0.1


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_the_unmerged_tree_is_kept_bit_for_bit(method):
  model = adapt(Stack("scanned"), METHODS[method], targets=TARGETS)
  variables = start(model)
  params = randomise(variables["params"])
  before = {p: np.array(x).tobytes() for p, x in flatten_dict(params).items()}
  merged = merge(
    params,
    variables.get("projections", {}),
    adapter=model.adapter,
    targets=model.find_targets(X),
  )
  after = {p: np.array(x).tobytes() for p, x in flatten_dict(params).items()}
  assert after == before
  kernel = ("layer", "up", "kernel")
  assert flatten_dict(merged)[kernel].tobytes() != before[kernel]


def test_only_adapted_kernels_change_and_keep_their_type():
  model = adapt(Stack("scanned"), METHODS["vera"], targets=["up"])
  variables = start(model)
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"])
  before = flatten_dict(randomise(half))
  merged = merge(
    unflatten_dict(before),
    variables["projections"],
    adapter=model.adapter,
    targets=model.find_targets(X),
  )
  after = flatten_dict(merged)
  changed = {p for p in after if not np.array_equal(after[p], before[p])}
  assert changed == {("layer", "up", "kernel")}
  assert all(leaf.dtype == jnp.bfloat16 for leaf in after.values())
