"""An adapted nnx model is a model: for jax's and flax's transformations, for
stacks on either axis, for meshes, copies and pickle."""

import copy
import pickle
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vera_jax
import vera_jax.nnx
from tests.nnx.test_adapt import METHODS, move
from vera_jax.errors import UserError
from vera_jax.nnx.adapt import NUMBER, adaptation_of, set_values, tree_of

X = jnp.linspace(-1, 1, 16).reshape(2, 8)
VERA = METHODS["factored"]
MODES = {"graph": True, "tree": False}


class Net(nnx.Module):
  """Two layers, called in another order than they are defined in."""

  def __init__(self, rngs):
    self.second = nnx.Linear(6, 4, rngs=rngs)
    self.first = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.tanh(self.first(x)))


def adapted(rngs=None, projections="made"):
  return vera_jax.nnx.adapt(
    Net(rngs or nnx.Rngs(0)),
    VERA,
    targets=["first", "second"],
    projections=projections,
  )


def call(model, x):
  return model(x)


def abstract(projections):
  """A model of shapes alone, filled afterwards."""
  shapes = nnx.eval_shape(lambda: adapted(projections=projections))
  return lambda model: nnx.merge(nnx.graphdef(shapes), nnx.state(model))


def updated(projections):
  other = adapted(projections=projections)

  def copy_leaves(model):
    nnx.update(other, nnx.state(model, nnx.LoRAParam))
    return other

  return copy_leaves


COPIES = {
  "split": lambda projections: lambda model: nnx.merge(*nnx.split(model)),
  "clone": lambda projections: nnx.clone,
  "copy": lambda projections: copy.copy,
  "deepcopy": lambda projections: copy.deepcopy,
  "pickle": lambda projections: lambda x: pickle.loads(pickle.dumps(x)),
  "update": updated,
  "eval_shape": abstract,
}


@pytest.mark.parametrize("projections", ["made", "held"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_adapted_as_the_model(name, mode, projections):
  with nnx.set_graph_mode(MODES[mode]):
    model = move(adapted(projections=projections))
    other = COPIES[name](projections)(model)
    np.testing.assert_array_equal(other(X), model(X))
    assert isinstance(other.first, nnx.Linear)
    plain = vera_jax.nnx.remove(other)
    assert type(plain) is Net and type(plain.first) is nnx.Linear
    np.testing.assert_array_equal(plain(X), Net(nnx.Rngs(0))(X))


@pytest.mark.parametrize("projections", ["made", "held"])
@pytest.mark.parametrize("mode", MODES)
def test_a_transformed_call_is_the_models(mode, projections):
  close = partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)
  with nnx.set_graph_mode(MODES[mode]):
    model = move(adapted(projections=projections))
    y = model(X)
    close(nnx.jit(call)(model, X), y)
    close(nnx.remat(call)(model, X), y)
    close(nnx.vmap(call, in_axes=(None, 0))(model, X), y)
    graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)

    @partial(nnx.jit, static_argnums=0)
    def gradient(graph, trained, rest):
      def loss(trained):
        return jnp.sum(jnp.sin(nnx.merge(graph, trained, rest)(X)))

      return nnx.grad(loss)(trained)

    expected = nnx.to_pure_dict(gradient(graph, trained, rest))
    assert len(jax.tree.leaves(expected)) == 4
    if MODES[mode]:
      wrt = nnx.DiffState(0, nnx.LoRAParam)
      run = nnx.grad(lambda m: jnp.sum(jnp.sin(m(X))), argnums=wrt)
      jax.tree.map(close, nnx.to_pure_dict(run(model)), expected)

    make = partial(adapted, projections=projections)
    several = nnx.vmap(make)(nnx.Rngs(0).split(2))
    assert several.first.vera_b.shape == (2, 6)
    ys = nnx.vmap(call, in_axes=(0, None))(several, X)
    one = jax.tree.map(lambda leaf: leaf[1], nnx.state(several))
    close(ys[1], nnx.merge(nnx.graphdef(several), one)(X))


def test_a_method_of_no_table_is_no_pickle():
  model = vera_jax.nnx.adapt(
    Net(nnx.Rngs(0)), VERA._replace(method="", settings=None), targets=["first"]
  )
  with pytest.raises(UserError, match="rank"):
    pickle.dumps(model)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 12, rngs=rngs)
    self.down = nnx.Linear(12, 8, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(x)))


class Stack(nnx.Module):
  """Three blocks in a list, or stacked on an axis."""

  def __init__(self, axis=None, block=Block):
    self.axis = axis
    blocks = [block(nnx.Rngs(i)) for i in range(3)]
    self.layer = nnx.List(blocks)
    if axis is not None:
      states = [nnx.state(block) for block in blocks]
      stack = jax.tree.map(
        lambda *x: jnp.stack(x, min(axis, x[0].ndim)), *states
      )
      self.layer = nnx.merge(nnx.graphdef(blocks[0]), stack)

  def __call__(self, x):
    if self.axis is None:
      for block in self.layer:
        x = block(x)
      return x
    axes = nnx.Carry, self.axis
    return nnx.scan(lambda x, b: b(x), in_axes=axes, out_axes=nnx.Carry)(
      x, self.layer
    )


def on_stack(name, axis=None):
  return vera_jax.nnx.adapt(
    Stack(axis), METHODS[name], targets=["up", "down"], rngs=nnx.Rngs(1)
  )


def stacked_leaves(tree):
  """Those of the list's layers, stacked in front as the scanned model's."""
  flat, by_layer = flatten_dict(tree), {}
  for (layer, *path), leaf in flat.items():
    if layer.startswith("layer_"):
      by_layer.setdefault(("layer", *path), []).append(leaf)
    else:
      by_layer[layer, *path] = leaf
  return {
    path: jnp.stack(x) if isinstance(x, list) else x
    for path, x in by_layer.items()
  }


@nnx.jit
def in_graph_mode(model, x):
  def loss(model):
    y = model(x)
    return jnp.sum(jnp.sin(y)), y

  wrt = nnx.DiffState(0, nnx.LoRAParam)
  run = nnx.value_and_grad(loss, argnums=wrt, has_aux=True)
  (_, y), gradient = run(model)
  return y, gradient, vera_jax.nnx.merge(model)(x)


def in_tree_mode(model, x):
  graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)

  @jax.jit
  def run(trained, rest, x):
    def loss(trained):
      y = nnx.merge(graph, trained, rest)(x)
      return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    return y, gradient, vera_jax.nnx.merge(nnx.merge(graph, trained, rest))(x)

  return run(trained, rest, x)


ALL = [
  pytest.param(name, axis, mode, marks=pytest.mark.slow)
  for name in METHODS
  for axis, mode in ((0, "graph"), (1, "tree"), (1, "graph"), (0, "tree"))
  if name in ("vera", "unique") or (axis, mode) in ((0, "graph"), (1, "tree"))
]


@pytest.mark.parametrize(
  ("name", "axis", "mode"), [("factored", 1, "graph"), *ALL]
)
def test_a_stack_is_its_layers_one_after_another(name, axis, mode):
  """With one pair for all layers, and with matrices of each layer's own."""
  looped, scanned = on_stack(name), on_stack(name, axis)
  kernel = scanned.layer.up.kernel
  for variable in jax.tree.leaves(
    nnx.state(scanned.layer.up, nnx.LoRAParam),
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  ):
    assert variable.shape[min(axis, variable.ndim - 1)] == 3
  assert kernel.shape[axis] == 3
  close = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
  first = stacked_leaves(tree_of(looped))
  for path, leaf in flatten_dict(tree_of(scanned)).items():
    if path[-1] != NUMBER:
      close(leaf, first[path], err_msg="/".join(path))
  if name != "unilora":  # it starts from random numbers
    close(scanned(X), Stack()(X))
  for model in (looped, scanned):
    own = {
      p: x
      + 0.1
      * jnp.cos(
        7 * x + jax.lax.broadcasted_iota(jnp.float32, x.shape, x.ndim - 1)
      )
      for p, x in flatten_dict(tree_of(model)).items()
      if METHODS[name].owns(p[-1])
    }
    set_values(model, own)
  y, gradient, merged = in_graph_mode(looped, X)
  with nnx.set_graph_mode(MODES[mode]):
    run = in_graph_mode if MODES[mode] else in_tree_mode
    scanned_y, scanned_gradient, scanned_merged = run(scanned, X)
  scale = float(abs(y).max())
  np.testing.assert_allclose(scanned_y, y, rtol=1e-6, atol=1e-6 * scale)
  for other in (merged, scanned_merged):
    np.testing.assert_allclose(other, y, rtol=2e-6, atol=2e-6 * scale)
  nnx.update(looped, gradient)
  nnx.update(scanned, scanned_gradient)
  expected = stacked_leaves(tree_of(looped))
  for path, leaf in flatten_dict(tree_of(scanned)).items():
    if path[-1] == NUMBER:
      continue
    largest = float(abs(expected[path]).max())
    np.testing.assert_allclose(
      leaf, expected[path], rtol=2e-6, atol=2e-6 * largest
    )


class Square(nnx.Module):
  """As many layers as inputs, so that shapes don't tell the axis."""

  def __init__(self, rngs):
    self.up = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.up(x)


def test_an_axis_that_shapes_do_not_tell_is_asked_for():
  adapt = partial(vera_jax.nnx.adapt, adapter=VERA, targets=["up"])
  with pytest.raises(UserError, match="layer/up.*give stack_axis"):
    adapt(Stack(1, Square))
  assert adapt(Stack(1, Square), stack_axis=1).layer.up.vera_b.shape == (3, 3)
  noted = Stack(1, Square)  # as MaxText does it
  noted.layer.up.kernel.set_metadata("param_scan_axis", 1)
  adaptation = adaptation_of(adapt(noted))
  assert adaptation.sites["layer", "up"].axis == 1
  with pytest.raises(UserError, match="has the shape.*not.*stack at 0"):
    vera_jax.nnx.adapt(Stack(1), VERA, targets=["up"], stack_axis=0)


def test_a_file_knows_the_axis_of_leaves_that_are_not_adapted(tmp_path):
  def adapt(targets):
    return vera_jax.nnx.adapt(Stack(1), VERA, targets=targets)

  model = move(adapt(["up", "down"]))
  vera_jax.nnx.save(tmp_path, model)
  loaded = vera_jax.nnx.load(tmp_path, Stack(0))
  np.testing.assert_allclose(loaded(X), model(X), rtol=2e-6, atol=1e-6)
  vera_jax.nnx.save(tmp_path, adapt(["up"]))
  with pytest.raises(UserError, match="layers of a stack on the same axis"):
    vera_jax.nnx.load(tmp_path, Stack(0))


def test_each_layer_of_a_stack_draws_numbers_of_its_own():
  class Same(nnx.Module):
    def __init__(self):
      block = nnx.state(Square(nnx.Rngs(0)))
      stack = jax.tree.map(lambda x: jnp.stack([x, x]), block)
      self.layer = nnx.merge(nnx.graphdef(Square(nnx.Rngs(0))), stack)

    def __call__(self, x):
      axes = {"in_axes": (None, 0), "out_axes": 0}
      return nnx.scan(lambda x, layer: layer(x), **axes)(x, self.layer)

  model = vera_jax.nnx.adapt(Same(), METHODS["pvera"], targets=["up"])
  leaf = model.layer.up.pvera_b
  leaf.set_value(jnp.ones_like(leaf.get_value()))
  x = jnp.ones((2, 3))
  np.testing.assert_array_equal(*model(x))
  with vera_jax.nnx.training(jax.random.key(0)):
    first, second = model(x)
  assert (first != second).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_the_same(kind):
  class Sharded(nnx.Module):
    def __init__(self, rngs):
      init = nnx.initializers.lecun_normal()
      up = nnx.with_partitioning(init, (None, "model"))
      down = nnx.with_partitioning(init, ("model", None))
      self.up = nnx.Linear(8, 12, kernel_init=up, rngs=rngs)
      self.down = nnx.Linear(12, 8, kernel_init=down, rngs=rngs)

    def __call__(self, x):
      explicit = kind == AxisType.Explicit
      rows = PartitionSpec("data", None) if explicit else None
      return self.down(nnx.tanh(self.up(x)), out_sharding=rows)

  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data", None)))
    model = Sharded(nnx.Rngs(0))
    before = nnx.jit(call)(model, x)
    vera_jax.nnx.adapt(model, VERA, targets=["up", "down"])
    y = nnx.jit(call)(model, x)
    np.testing.assert_allclose(y, before, rtol=1e-6, atol=1e-6)
    y, gradient, merged = in_graph_mode(move(model), x)
    np.testing.assert_allclose(merged, y, rtol=2e-6, atol=2e-6)
    assert len(jax.tree.leaves(gradient)) == 4
    vera_jax.nnx.remove(model)
    lora_xs = METHODS["lora_xs"]  # of the base's kernels, which are split
    y = nnx.jit(call)(vera_jax.nnx.adapt(model, lora_xs, targets=["up"]), x)
    np.testing.assert_allclose(y, before, rtol=1e-6, atol=1e-6)


def test_what_is_added_lies_where_the_base_does(tmp_path):
  mesh = jax.make_mesh((2, 4), ("data", "model"))

  def base():
    model = Net(nnx.Rngs(0))
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))
    for layer in (model.first, model.second):
      layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), spread))
    return model

  def adapt(name, projections):
    return vera_jax.nnx.adapt(
      base(), METHODS[name], targets=["first"], projections=projections
    )

  vera_jax.nnx.save(tmp_path, move(adapt("dora", "made")))
  models = [
    adapt("factored", "held"),
    adapt("unique", "made"),
    vera_jax.nnx.load(tmp_path, base()),
  ]
  for model in models:
    added = nnx.state(model, (nnx.LoRAParam, vera_jax.nnx.Projection))
    assert jax.tree.leaves(added)
    for leaf in jax.tree.leaves(added):
      assert leaf.sharding.device_set == set(mesh.devices.flat)


class Called(nn.Module):
  """`Net` on linen, whose layers have the order of their calls."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="second")(nn.tanh(nn.Dense(6, name="first")(x)))


def test_layers_have_the_order_in_which_they_were_defined(tmp_path):
  adapter, targets = METHODS["unilora"], ["first", "second"]
  for model in (Net(nnx.Rngs(0)), nnx.clone(Net(nnx.Rngs(0)))):
    found = vera_jax.nnx.find_targets(model, targets)
    assert list(found) == [("second",), ("first",)]
  net = vera_jax.adapt(Called(), adapter, targets=targets)
  base = {"params": tree_of(Net(nnx.Rngs(0)))}
  variables = net.init_on(base, jax.random.key(0), X)
  trainable = {"unilora_theta": variables["params"]["unilora_theta"]}
  net.save(tmp_path, trainable, variables)
  with pytest.raises(UserError, match="projections .* come out different"):
    vera_jax.nnx.load(tmp_path, Net(nnx.Rngs(0)))


def test_the_parts_of_attention_are_linens():
  model = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0)
  )

  class Outer(nnx.Module):
    def __init__(self):
      self.attention = model

    def __call__(self, x):
      return self.attention(x)

  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.MultiHeadDotProductAttention(2, name="attention")(x)

  targets = ["query", "key", "value", "out"]
  ours = Outer()
  base, x = tree_of(ours), X[None]
  move(vera_jax.nnx.adapt(ours, VERA, targets=targets))
  net = vera_jax.adapt(Linen(), VERA, targets=targets)
  variables = net.init_on({"params": base}, jax.random.key(0), x)
  params = unflatten_dict(flatten_dict(tree_of(ours)))
  expected = net.apply({**variables, "params": params}, x)
  np.testing.assert_allclose(ours(x), expected, rtol=1e-6, atol=1e-6)
  merged = vera_jax.nnx.merge(ours)
  np.testing.assert_allclose(merged(x), expected, rtol=2e-6, atol=2e-6)
