"""An adapter on an nnx model is the same adapter on the linen model."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import vera_jax
import vera_jax.nnx
from vera_jax.adapters.files import SHA256
from vera_jax.errors import UserError
from vera_jax.nnx import Projection
from vera_jax.nnx.adapt import modules_of, named, projections_of, tree_of

TOKENS = jnp.arange(10).reshape(2, 5)
TARGETS = ["embed", "layers_.", "query", "out", "ein", "conv"]
EQUATION = "...d,dnh->...nh"


class Model(nnx.Module):
  """One layer of each kind, and two in a list."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 8, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
    self.query = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    self.out = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
    self.ein = nnx.Einsum(EQUATION, (8, 2, 3), (2, 3), rngs=rngs)
    self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = nnx.gelu(layer(x))
    x = x + self.out(jnp.sin(self.query(x)))
    outputs = self.ein(x), self.conv(x), self.embed.attend(x)
    return jnp.concatenate([y.reshape(2, 5, -1) for y in outputs], axis=-1)


class Linen(nn.Module):
  """The same."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 8, name="embed")
    x = embed(tokens)
    for number in range(2):
      x = nn.gelu(nn.Dense(8, name=f"layers_{number}")(x))
    y = nn.DenseGeneral((2, 3), name="query")(x)
    x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(jnp.sin(y))
    outputs = (
      nn.Einsum((8, 2, 3), EQUATION, name="ein")(x),
      nn.Conv(4, (3,), name="conv")(x),
      embed.attend(x),
    )
    return jnp.concatenate([y.reshape(2, 5, -1) for y in outputs], axis=-1)


METHODS = {
  "vera": vera_jax.vera(rank=16),
  "factored": vera_jax.vera(rank=3),
  "unique": vera_jax.vera(rank=4, sharing="unique"),
  "lora": vera_jax.lora(rank=2),
  "lora_fa": vera_jax.lora_fa(rank=2),
  "lora_xs": vera_jax.lora_xs(rank=2),
  "tied_lora": vera_jax.tied_lora(rank=3),
  "ia3": vera_jax.ia3(),
  "dora": vera_jax.dora(rank=2),
  "dvora": vera_jax.dvora(rank=4),
  "randlora": vera_jax.randlora(rank=2),
  "unilora": vera_jax.unilora(rank=2, size=50),
  "pvera": vera_jax.pvera(rank=4),
  "onelora": vera_jax.onelora(),
  "chain": vera_jax.chain(vera_jax.lora(rank=2), vera_jax.ia3()),
}


def moved(tree):
  """The leaves after a step that is no symmetric one."""
  flat = flatten_dict(tree)
  return unflatten_dict(
    {
      path: leaf
      + 0.1
      * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype) + i).reshape(leaf.shape)
      for i, (path, leaf) in enumerate(sorted(flat.items()))
    }
  )


def trained(model):
  """The trained variables by linen's paths."""
  return {
    (*path, name): variable
    for path, module in modules_of(model).items()
    for name, variable in vars(module).items()
    if isinstance(variable, nnx.LoRAParam)
  }


def set_leaves(model, flat):
  for path, variable in trained(model).items():
    variable.set_value(flat[path])


def move(model):
  leaves = {path: x.get_value() for path, x in trained(model).items()}
  set_leaves(model, flatten_dict(moved(unflatten_dict(leaves))))
  return model


EVERY = [
  name if name == "vera" else pytest.param(name, marks=pytest.mark.slow)
  for name in METHODS
]


@pytest.mark.parametrize("name", EVERY)
def test_every_method_is_linens(name):
  adapter = METHODS[name]
  model = Model(nnx.Rngs(0))
  base, before = tree_of(model), model(TOKENS)
  model = vera_jax.nnx.adapt(model, adapter, targets=TARGETS, rngs=nnx.Rngs(1))
  adapted = vera_jax.adapt(Linen(), adapter, targets=TARGETS)
  key = nnx.Rngs(1).params()
  variables = adapted.init_on({"params": base}, key, TOKENS)
  first = flatten_dict(variables["params"])
  projections = flatten_dict(variables.get("projections", {}))
  for path, leaf in flatten_dict(tree_of(model)).items():
    expected = first[path] if path in first else projections[path]
    np.testing.assert_array_equal(leaf, expected)
  if name != "unilora":  # it starts from random numbers
    np.testing.assert_allclose(model(TOKENS), before, rtol=1e-6, atol=1e-6)

  own = {p: leaf for p, leaf in first.items() if adapter.owns(p[-1])}
  own = moved(unflatten_dict(own))
  set_leaves(model, flatten_dict(own))

  @nnx.jit
  def ours(model):
    def loss(model):
      y = model(TOKENS)
      return jnp.sum(jnp.sin(y)), y

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    (_, y), gradient = nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(
      model
    )
    return y, gradient, vera_jax.nnx.merge(model)(TOKENS)

  @jax.jit
  def linens(own):
    def loss(own):
      params = vera_jax.join(unflatten_dict(first), own)
      y = adapted.apply({**variables, "params": params}, TOKENS)
      return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(own)
    return y, gradient

  y, gradient, merged = ours(model)
  expected, linen_gradient = linens(own)
  close = partial(np.testing.assert_allclose, rtol=2e-6)
  close(y, expected, atol=1e-6 * abs(expected).max())
  close(merged, y, atol=2e-6 * abs(expected).max())
  gradient = {
    named(path): x
    for path, x in flatten_dict(nnx.to_pure_dict(gradient)).items()
  }
  for path, leaf in flatten_dict(linen_gradient).items():
    close(gradient[path], leaf, atol=2e-6 * abs(leaf).max())


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 12, rngs=rngs)
    self.down = nnx.LinearGeneral(12, 8, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(x)))


class Stack(nnx.Module):
  """Three blocks whose parameters are stacked, or in a list."""

  def __init__(self, rngs, *, scanned):
    blocks = [Block(nnx.Rngs(i)) for i in range(3)]
    self.layer = nnx.List(blocks)
    if scanned:
      state = [nnx.state(block) for block in blocks]
      stacked = jax.tree.map(lambda *x: jnp.stack(x), *state)
      self.layer = nnx.merge(nnx.graphdef(blocks[0]), stacked)

  def __call__(self, x):
    if not isinstance(self.layer, Block):
      for block in self.layer:
        x = block(x)
      return x

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
      return block(x)

    return run(x, self.layer)


@nnx.jit
def loss_and_gradient(model, x):
  def loss(model):
    return jnp.sum(jnp.sin(model(x)))

  run = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
  value, gradient = run(model)
  return value, nnx.to_pure_dict(gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vera", "unique"])
def test_a_scanned_stack_is_its_layers_one_after_another(name):
  """One pair for all layers, and one for each."""
  x, adapter = jax.random.normal(jax.random.key(2), (2, 8)), METHODS[name]
  looped, scanned = (
    vera_jax.nnx.adapt(
      Stack(nnx.Rngs(0), scanned=scanned), adapter, targets=["up", "down"]
    )
    for scanned in (False, True)
  )
  leaves = {path: x.get_value() for path, x in trained(move(looped)).items()}
  for (layer, *path), variable in trained(scanned).items():
    assert layer == "layer"
    layers = [leaves[f"layer_{number}", *path] for number in range(3)]
    variable.set_value(jnp.stack(layers))
  loss, gradient = loss_and_gradient(looped, x)
  scanned_loss, scanned_gradient = loss_and_gradient(scanned, x)
  np.testing.assert_allclose(scanned_loss, loss, rtol=1e-6)
  expected = jax.tree.map(lambda *x: jnp.stack(x), *gradient["layer"].values())
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7),
    scanned_gradient["layer"],
    expected,
  )
  merged = vera_jax.nnx.merge(scanned)
  np.testing.assert_allclose(merged(x), scanned(x), rtol=2e-6, atol=1e-6)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.query = nnx.Linear(8, 8, rngs=rngs)
    self.value = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
    self.table = nnx.Linear(4, 4, rngs=rngs)
    self.again = nnx.Embed(4, 8, rngs=rngs)
    self.tied = self.again

  def __call__(self, x):
    y = nnx.tanh(self.value(nnx.tanh(self.query(x))))
    return self.table(y) @ self.table.kernel[...]


X = jnp.linspace(-1, 1, 16).reshape(2, 8)


def test_a_model_is_as_before_but_for_the_class_of_its_layers():
  model = Net(nnx.Rngs(0))
  before, graph = model(X), nnx.state(model)
  same = vera_jax.nnx.adapt(model, METHODS["vera"], targets=["query", "value"])
  assert same is model and isinstance(model.query, nnx.Linear)
  np.testing.assert_array_equal(model(X), before)
  assert trained(model).keys() == {
    (layer, leaf)
    for layer in ("query", "value")
    for leaf in ("vera_b", "vera_d")
  }
  copy = nnx.clone(model)
  move(model)
  np.testing.assert_array_equal(copy(X), before)
  assert not np.array_equal(model(X), before)
  vera_jax.nnx.remove(model)
  assert type(model) is Net and type(model.query) is nnx.Linear
  np.testing.assert_array_equal(model(X), before)
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(graph)


def test_a_part_of_a_kernel_is_a_layer_of_its_own():
  fused = {"query": {"key": (2, 5)}}
  model = Net(nnx.Rngs(0))
  base = model.query(X)
  vera_jax.nnx.adapt(model, METHODS["vera"], targets=["key"], fused=fused)
  assert trained(model)["query", "key", "vera_b"].shape == (3,)
  move(model)
  moves = (model.query(X) != base).any(0)
  np.testing.assert_array_equal(moves, [0, 0, 1, 1, 1, 0, 0, 0])


def test_what_cannot_be_adapted_is_an_error_by_name():
  adapt, vera = vera_jax.nnx.adapt, METHODS["vera"]
  with pytest.raises(UserError, match="(?s)target pattern 'quary'.*query"):
    adapt(Net(nnx.Rngs(0)), vera, targets=["quary"])
  with pytest.raises(UserError, match="the class Net"):
    adapt(Net, vera, targets=["query"])
  model = adapt(Net(nnx.Rngs(0)), vera, targets=["query", "table"])
  with pytest.raises(UserError, match="reads the kernel of table itself"):
    model(X)
  with pytest.raises(UserError, match="has an adapter already"):
    adapt(model, vera, targets=["value"])
  with pytest.raises(UserError, match="has no adapter"):
    vera_jax.nnx.merge(Net(nnx.Rngs(0)))
  for fused, said in (
    ({"quary": {"key": (0, 4)}}, "'quary' of `fused`"),
    ({"query": {"key": (4, 12)}}, "columns 4 to 12"),
  ):
    with pytest.raises(UserError, match=said):
      adapt(Net(nnx.Rngs(0)), vera, targets=["value"], fused=fused)
  with pytest.raises(UserError, match="projections is 'hold'"):
    adapt(Net(nnx.Rngs(0)), vera, targets=["query"], projections="hold")
  taken = Net(nnx.Rngs(0))
  taken.A = nnx.Param(jnp.zeros(3))
  with pytest.raises(UserError, match="The model has a field 'A' already"):
    adapt(taken, vera, targets=["query"], projections="held")
  adapt(taken, vera, targets=["query"])  # it was left as it came
  chained = vera_jax.chain(vera._replace(on=("quary",)), vera_jax.ia3())
  with pytest.raises(UserError, match="'quary', which is none of the targets"):
    adapt(Net(nnx.Rngs(0)), chained, targets=["query"])
  shared = adapt(Net(nnx.Rngs(0)), METHODS["unilora"], targets=["query"])
  with pytest.raises(UserError, match="call the whole model"):
    shared.query(X)


def test_saved_and_loaded_it_is_the_same(tmp_path):
  targets = ["query", "value"]
  model = vera_jax.nnx.adapt(Net(nnx.Rngs(0)), METHODS["vera"], targets=targets)
  move(model)
  vera_jax.nnx.save(tmp_path, model)
  loaded = vera_jax.nnx.load(tmp_path, Net(nnx.Rngs(0)))
  np.testing.assert_array_equal(loaded(X), model(X))
  other = Net(nnx.Rngs(1))
  for _ in range(2):  # it is given back as it came
    with pytest.raises(UserError, match="trained on other weights"):
      vera_jax.nnx.load(tmp_path, other)
  assert "vera trains 44 numbers" in vera_jax.nnx.summary(model)


HELD = {
  "vera": METHODS["vera"],
  "structured": vera_jax.vera(rank=4, init="structured"),
  "unilora": METHODS["unilora"],
}


@pytest.mark.parametrize("name", HELD)
def test_what_all_layers_share_is_made_in_the_step_or_held_once(tmp_path, name):
  made, held = (
    move(
      vera_jax.nnx.adapt(
        Net(nnx.Rngs(0)), HELD[name], targets=["value"], projections=projections
      )
    )
    for projections in ("made", "held")
  )
  run = nnx.jit(lambda model: model(X))
  np.testing.assert_array_equal(run(held), run(made))
  assert trained(held).keys() == trained(made).keys()
  fields = {n for n, x in vars(held).items() if isinstance(x, Projection)}
  shared = projections_of(made)
  assert fields == {n for n, x in shared.items() if not isinstance(x, dict)}
  assert not any(isinstance(x, Projection) for x in vars(made).values())

  merged = vera_jax.nnx.merge(held)
  np.testing.assert_array_equal(merged(X), vera_jax.nnx.merge(made)(X))
  before = jax.tree.structure(nnx.state(Net(nnx.Rngs(0))))
  assert jax.tree.structure(nnx.state(merged)) == before
  vera_jax.nnx.save(tmp_path, held)
  for projections in ("made", "held"):
    loaded = vera_jax.nnx.load(
      tmp_path, Net(nnx.Rngs(0)), projections=projections
    )
    assert fields & vars(loaded).keys() == (
      fields if projections == "held" else set()
    )
    np.testing.assert_array_equal(loaded(X), held(X))
  assert vera_jax.nnx.summary(held) == vera_jax.nnx.summary(made)
  jax.tree.map(
    np.testing.assert_array_equal,
    nnx.to_pure_dict(vera_jax.nnx.to_lora(held)),
    nnx.to_pure_dict(vera_jax.nnx.to_lora(made)),
  )
  vera_jax.nnx.remove(held)
  assert jax.tree.structure(nnx.state(held)) == before


def test_matrices_of_a_file_are_held(tmp_path):
  """Those that no seed gives, as an adapter of PEFT's may have."""
  model = vera_jax.nnx.adapt(
    Net(nnx.Rngs(0)), METHODS["vera"], targets=["value"]
  )
  vera_jax.nnx.save(tmp_path, move(model))
  pair = {
    f"projections.{name}": np.asarray(matrix)
    for name, matrix in projections_of(model).items()
  }
  about = json.loads((tmp_path / "adapter.json").read_text())
  about["settings"]["init"] = "stored"
  del about[SHA256]  # of the tensors as they were
  (tmp_path / "adapter.json").write_text(json.dumps(about))
  file = tmp_path / "adapter.safetensors"
  save_file(load_file(file) | pair, file)
  loaded = vera_jax.nnx.load(tmp_path, Net(nnx.Rngs(0)))
  assert isinstance(loaded.A, Projection)
  np.testing.assert_array_equal(loaded(X), model(X))
  vera_jax.nnx.save(tmp_path / "again", loaded)
  again = vera_jax.nnx.load(tmp_path / "again", Net(nnx.Rngs(0)))
  np.testing.assert_array_equal(again(X), model(X))


@pytest.mark.parametrize("rank", [3, 16])  # narrower, and wider than layers
def test_as_lora_it_is_exact(rank):
  model = vera_jax.nnx.adapt(
    Model(nnx.Rngs(0)),
    vera_jax.vera(rank=rank),
    targets=["layers_.", "query", "out", "ein"],
  )
  base = tree_of(Model(nnx.Rngs(0)))
  move(model)
  merged = tree_of(vera_jax.nnx.merge(model))
  pairs = nnx.to_pure_dict(vera_jax.nnx.to_lora(model))
  pairs |= {f"layers_{i}": pair for i, pair in pairs.pop("layers").items()}
  for name, pair in pairs.items():
    a, b = pair["kernel_lora_a"], pair["kernel_lora_b"]
    inputs, outputs = (6, 8) if name == "out" else (8, 8 if "_" in name else 6)
    assert a.shape[-1] == len(b) == min(rank, inputs, outputs)
    delta = a.reshape(inputs, -1) @ b.reshape(-1, outputs)
    moved_by = merged[name]["kernel"] - base[name]["kernel"]
    np.testing.assert_allclose(
      delta, moved_by.reshape(inputs, outputs), atol=2e-6
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix's own
def test_qwix_computes_the_same_lora():
  qwix = pytest.importorskip("qwix")
  model = vera_jax.nnx.adapt(
    Model(nnx.Rngs(0)), METHODS["factored"], targets=["layers_.", "ein"]
  )
  move(model)
  provider = qwix.LoraProvider(module_path="layers/.*|ein", rank=3, alpha=3.0)
  theirs = qwix.apply_lora_to_model(
    Model(nnx.Rngs(0)), provider, TOKENS, rngs=nnx.Rngs(0)
  )
  nnx.update(theirs, vera_jax.nnx.to_lora(model))
  np.testing.assert_allclose(
    theirs(TOKENS), model(TOKENS), rtol=2e-6, atol=2e-6
  )
