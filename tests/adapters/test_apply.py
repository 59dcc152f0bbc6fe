"""Adapters on any linen model: what is matched, and what is left alone."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from vera_jax.adapters.apply import adapt, find_targets
from vera_jax.adapters.base_leaves import bitfit
from vera_jax.adapters.chain import chain
from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.interface import Target
from vera_jax.adapters.labels import count, label_tree
from vera_jax.adapters.lora import lora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.projections import make_projections
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


class Net(nn.Module):
  """Keyword inputs, a flag that Python reads, dropout, nested names."""

  @nn.compact
  def __call__(self, x, wide: bool = True, *, deterministic: bool = True):
    y = nn.Dense(6, name="query")(inputs=x)
    y = nn.Dropout(0.5, deterministic=deterministic)(y)
    if wide:
      y = jnp.concatenate([y, y], axis=-1)
    return nn.Dense(2, name="query_out")(nn.LayerNorm()(y))


class Twice(nn.Module):
  """One layer, made in setup, used two times."""

  def setup(self):
    self.layer = nn.Dense(4)

  def __call__(self, x):
    return self.layer(self.layer(x))


class Grouped(nn.Module):
  """A kernel for each of the rows: no single delta fits it."""

  @nn.compact
  def __call__(self, x):
    y = nn.DenseGeneral(2, batch_dims=(0,), name="grouped")(x)
    return nn.Dense(2, name="plain")(y)


@partial(jax.jit, static_argnums=0, static_argnames=("wide", "deterministic"))
def run(model, variables, x, key=None, **options):
  rngs = None if key is None else {"dropout": key}
  return model.apply(variables, x, rngs=rngs, **options)


def start(model, *args, seed=0, **kwargs):
  return jax.jit(partial(model.init, **kwargs))(jax.random.key(seed), *args)


def test_the_models_own_tree_and_outputs_stay():
  """Equal keys give equal base leaves, with the adapter and without."""
  model = adapt(Net(), vera(3), targets=["query"])
  variables, own = start(model, X), start(Net(), X)
  params = flatten_dict(variables["params"])
  for path, leaf in flatten_dict(own["params"]).items():
    np.testing.assert_array_equal(params.pop(path), leaf)
  assert params.keys() == {("query", "vera_d"), ("query", "vera_b")}
  np.testing.assert_array_equal(run(model, variables, X), run(Net(), own, X))


def test_what_is_not_the_models_weights_is_refused():
  """And collections beside them are passed on."""
  model = adapt(Net(), vera(3), targets=["query"])
  own = start(Net(), X)
  there = model.init_on({**own, "seen": {"n": 1}}, jax.random.key(0), X)
  assert there["seen"] == {"n": 1} and "projections" in there
  del own["params"]["query"]
  with pytest.raises(UserError, match="have no kernel at query"):
    model.init_on(own, jax.random.key(0), X)


def test_a_pattern_matches_whole_names_at_the_paths_end():
  def found(*patterns):
    return {"/".join(path) for path in find_targets(Net(), patterns, X)}

  assert found("query") == {"query"}
  assert found("query.*") == {"query", "query_out"}
  assert found("query", "query_out") == {"query", "query_out"}
  assert found("query|query_out") == {"query", "query_out"}


def test_a_pattern_without_a_match_lists_the_layers():
  model = adapt(Net(), vera(3), targets=["query", "uery", "key"])
  with pytest.raises(UserError, match="'uery'(.|\n)*query\n  query_out"):
    model.init(jax.random.key(0), X)


BOUND = Net().bind({"params": {}})
ON_QUERY = tuple(link._replace(on=("query",)) for link in (vera(2), ia3()))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "the nnx module Linear"),
    ({"model": Net}, r"the class Net; give a module of it: Net\(\.\.\.\)"),
    ({"model": np.tanh}, "The model is <ufunc 'tanh'>; give a module of"),
    ({"model": None}, "The model is None"),
    ({"model": BOUND}, "a Net, is bound"),
    (
      {"model": adapt(Net(), lora(2), targets=["query"])},
      r"an adapter already, lora: .* chain\(first, second\)",
    ),
    ({"adapter": vera}, "The adapter is <the method vera>"),
    ({"targets": None}, "targets is None"),
    ({"targets": "query"}, "give a list"),
    ({"targets": []}, r"targets is empty, but vera .*\['\.\*'\]"),
    ({"adapter": bitfit()}, "bitfit .* no layers, but targets is"),
    ({"fused": {"qury": {"q": (0, 1)}}}, "'qury' of `fused`.*\n  query"),
    ({"fused": {"query": {"q": (0, 9)}}}, "'q' of query has the columns 0"),
    ({"adapter": ia3(feedforward=["ot"])}, "ia3 names 'ot', which is none"),
    (
      {"adapter": chain(vera(2)._replace(on=("qury",)), bitfit())},
      "vera names 'qury', which is none of the targets: query",
    ),
    (
      {
        "adapter": chain(*ON_QUERY),
        "targets": ["query", "query_out"],
      },
      r"None of the methods of vera\+ia3 is on the targets query_out",
    ),
  ],
  ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_names_nothing_is_refused(changes, message):
  given = {"model": Net(), "adapter": vera(2), "targets": ["query"]} | changes
  # without the hook that checks types here, which users have not
  as_users_call = inspect.unwrap(adapt), inspect.unwrap(find_targets)
  with pytest.raises(UserError, match=message):
    as_users_call[0](**given).find_targets(X)
  if "model" in changes:
    with pytest.raises(UserError, match=message):
      as_users_call[1](given["model"], ["query"], X)


def test_layers_with_a_kernel_per_row_are_no_targets():
  with pytest.raises(UserError, match="adapted are:\n  plain$"):
    find_targets(Grouped(), ["grouped"], X)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_static_arguments_reach_the_model(shape):
  """By position and by keyword; shapes may stand for arrays."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  at = ("query_out",)
  want = {at: Target(6, 2)}
  assert find_targets(Net(), ["query_out"], x, False) == want
  assert find_targets(Net(), ["query_out"], x, wide=False) == want
  assert find_targets(Net(), ["query_out"], x=x) == {at: Target(12, 2)}


def test_keyword_inputs_and_flags():
  model = adapt(Net(), vera(3), targets=["query"])
  variables = jax.jit(lambda x: model.init(jax.random.key(0), x=x))(X)
  own = {"params": variables["params"]}
  key = jax.random.key(1)
  dropped = run(model, variables, X, key, deterministic=False)
  np.testing.assert_array_equal(
    dropped, run(Net(), own, X, key, deterministic=False)
  )
  assert jnp.abs(dropped - run(model, variables, X)).max() > 0.01
  narrow = start(model, X, wide=False)
  assert narrow["params"]["query_out"]["kernel"].shape == (6, 2)
  assert run(model, narrow, X, wide=False).shape == (3, 2)


def test_a_layer_that_is_used_twice_has_one_adapter():
  model = adapt(Twice(), lora(2), targets=["layer"])
  params = start(model, X)["params"]
  assert params["layer"].keys() == {"kernel", "bias", "lora_A", "lora_B"}
  up = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
  layer = {name: np.asarray(leaf) for name, leaf in params["layer"].items()}
  kernel = layer["kernel"] + 4 * (up @ layer["lora_A"]).T  # alpha / r is 4
  want = np.asarray(X) @ kernel @ kernel  # the bias starts at 0
  params = {"layer": {**layer, "lora_B": up}}
  got = run(model, {"params": params}, X)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_training_leaves_the_projections_alone():
  """Also where a step may write to every collection."""
  model = adapt(Net(), vera(3), targets=["query"])
  variables = start(model, X)
  projections = variables["projections"]

  @jax.jit
  def trained(params):
    def loss(params):
      y, changed = model.apply(
        {"params": params, "projections": projections}, X, mutable=True
      )
      return jnp.sum(jnp.square(y)), changed["projections"]

    grads, after = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), after

  params, after = trained(variables["params"])
  moved = jax.tree.map(jnp.subtract, params, variables["params"])
  assert jnp.abs(moved["query"]["vera_b"]).max() > 0
  jax.tree.map(np.testing.assert_array_equal, after, projections)


def test_the_output_comes_with_the_variables():
  model = adapt(Net(), vera(3), targets=["query"])
  y, variables = jax.jit(model.init_with_output)(jax.random.key(0), X)
  jax.tree.map(np.testing.assert_array_equal, variables, start(model, X))
  np.testing.assert_allclose(y, run(model, variables, X), rtol=1e-6)


def test_the_projections_follow_their_seed_alone():
  """Not the key of init, not the base: the seed, the rank and the widths."""

  def made(projection_seed, seed):
    method = vera(3, projection_seed=projection_seed)
    model = adapt(Net(), method, targets=["query", "query_out"])
    return start(model, X, seed=seed)["projections"]

  one, same, other = made(0, 0), made(0, 1), made(1, 0)
  for name, shape in {"A": (3, 12), "B": (6, 3)}.items():
    assert one[name].shape == shape
    np.testing.assert_array_equal(one[name], same[name])
    assert jnp.abs(one[name] - other[name]).max() > 0.1


class Block(nn.Module):
  """A square layer whose kernel and bias are boxed, if `names` are given."""

  names: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, x, _=None):
    first = nn.initializers.normal(1.0)
    if self.names:
      first = nn.with_partitioning(first, self.names)
    return nn.Dense(4, kernel_init=first, name="out")(x), None


class Stack(nn.Module):
  """Four of them, under linen's default name, ScanBlock_0."""

  axis: int = 0
  names: tuple[str, ...] | None = None

  @nn.compact
  def __call__(self, x):
    scanned = nn.scan(
      Block,
      variable_axes={"params": self.axis, "projections": 0},
      split_rngs={"params": True},
      length=4,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(self.names)(x)[0]


class Outer(nn.Module):
  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner(x)


def test_layers_of_a_stack_have_pairs_of_their_own():
  """Also where the stack's own name ends in a number."""
  found = find_targets(Stack(), ["out"], X)
  assert found == {("ScanBlock_0", "out"): Target(4, 4, (4,))}
  made = make_projections(
    found, rank=3, seed=0, init="kaiming_uniform", sharing="unique"
  )
  for name, matrices in made["ScanBlock_0"]["out"].items():
    assert len(np.unique(np.asarray(matrices), axis=0)) == 4, name


@pytest.mark.parametrize(
  "boxed, plain",
  [
    (Outer(Block(("rows", "columns"))), Outer(Block())),
    (Stack(names=("rows", "columns")), Stack()),
  ],
)
def test_kernels_with_partitioning(boxed, plain):
  """The base's leaves keep their boxes; the adapter does what it does else."""
  models = [adapt(m, lora(2), targets=["out"]) for m in (boxed, plain)]
  variables, want = (start(model, X) for model in models)
  names = nn.get_partition_spec(variables)
  assert "rows" in str(names)
  jax.tree.map(np.testing.assert_array_equal, nn.unbox(variables), want)
  trained = jax.tree.map(lambda leaf: leaf + 0.1, variables)
  (y, *_), (y_want, *_) = (
    jax.tree.leaves(run(model, v, X))
    for model, v in zip(models, (trained, nn.unbox(trained)), strict=True)
  )
  np.testing.assert_array_equal(y, y_want)
  targets = models[0].find_targets(X)
  labels = label_tree(trained["params"], lora(2))
  assert count(trained["params"], labels).adapter == adapter_size(
    lora(2), targets
  )
  merged = merge(trained["params"], {}, adapter=lora(2), targets=targets)
  (got, *_) = jax.tree.leaves(run(boxed, {"params": merged}, X))
  np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_layers_stacked_on_another_axis_are_refused():
  """Four layers of width four: shapes alone don't tell the axis."""
  with pytest.raises(UserError, match=r"ScanBlock_0/out .* axes \(1,\)"):
    find_targets(Stack(axis=1), ["out"], X)
  with pytest.raises(UserError, match="'params': 0"):
    adapt(Stack(axis=1), vera(3), targets=["out"]).init(jax.random.key(0), X)


def test_an_adapter_inside_another_module_is_refused():
  inner = adapt(Net(), vera(3), targets=["query"])
  with pytest.raises(UserError, match=r"adapt\(outer, adapter, targets="):
    Outer(inner).init(jax.random.key(0), X)
