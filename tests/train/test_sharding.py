"""One step is the same step on any mesh; what doesn't fit is refused."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from vera_jax.train.model import Model, init_state

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.labels import (
  ADAPTER,
  FROZEN,
  HEAD,
  count,
  label_tree,
  split,
)
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.train.sharding import (
  BATCH,
  REPLICATED,
  batch_shards,
  check_heads,
  make_mesh,
  param_shardings,
  portion_of,
  put,
  put_rows,
)
from vera_jax.train.step import (
  INPUTS,
  Frozen,
  State,
  jit_train_step,
  train_step,
)

ADAPTERS = {"vera": vera(4), "lora": lora(2)}
MESHES = {
  "data": {"data": 8},
  "all three": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp": {"data": 1, "fsdp": 8},
  "data and tensor": {"data": 2, "tensor": 4},
}
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
QUERY = "encoder/layer/attention/self/query"


@pytest.mark.smoke
@pytest.mark.parametrize(
  "sizes, shape",
  [
    ((), (8, 1, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((2, -1, 1), (2, 4, 1)),
    ((1, 1, -1), (1, 1, 8)),
    ((4, 2, -1), (4, 2, 1)),
  ],
)
def test_mesh_sizes(sizes, shape):
  mesh = make_mesh(*sizes)
  assert tuple(mesh.shape.values()) == shape
  assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
  assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
  "sizes",
  [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (16, 1, 1), (0, 1, 1), (-1, 0, 1),
   (-2, 1, 4), (-8, -1, 1), (4, 1, 1)],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes):
  data, fsdp, tensor = sizes
  words = f"data={data}, fsdp={fsdp}, tensor={tensor}.* 8 devices"
  with pytest.raises(UserError, match=words):
    make_mesh(*sizes)


def model_of(method):
  """A tiny BERT with the method's adapter; VeRA's has dropout too."""
  rate = 0.1 if method == "vera" else 0.0
  config = BertConfig.from_dict(
    {
      "model_type": "bert",
      "vocab_size": 24,
      "hidden_size": 16,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "intermediate_size": 32,
      "max_position_embeddings": 12,
      "hidden_dropout_prob": rate,
      "attention_probs_dropout_prob": rate,
    }
  )
  base = BertClassifier(config, 3)
  if method in ADAPTERS:
    return adapt(base, ADAPTERS[method], targets=["query", "value"])
  return base


def shapes_of(method):
  return jax.eval_shape(model_of(method).init, jax.random.key(0), IDS)


def test_where_each_kind_of_leaf_lies():
  params = shapes_of("vera")["params"]
  placed = flatten_dict(param_shardings(params, make_mesh(2, 2, 2)), sep="/")
  specs = {
    name: sharding.spec
    for name, sharding in placed.items()
    if sharding.spec != REPLICATED
  }
  column, row, bias = ("fsdp", "tensor"), ("tensor", "fsdp"), ("tensor",)
  layer = {
    **{f"attention/self/{n}/kernel": column for n in ("query", "key", "value")},
    **{f"attention/self/{n}/bias": bias for n in ("query", "key", "value")},
    "intermediate/dense/kernel": column,
    "intermediate/dense/bias": bias,
    "attention/output/dense/kernel": row,
    "output/dense/kernel": row,
  }
  assert specs == {
    **{f"encoder/layer/{n}": PartitionSpec(None, *s) for n, s in layer.items()},
    **{f"encoder/layer_2/{n}": PartitionSpec(*s) for n, s in layer.items()},
    "embeddings/word_embeddings/embedding": PartitionSpec(None, "fsdp"),
  }
  assert {f"{QUERY}/vera_d", f"{QUERY}/vera_b", "classifier/kernel"} <= (
    placed.keys() - specs.keys()
  )


@pytest.mark.parametrize(
  "sizes, shape, words",
  [
    ((1, 1, 8), (2, 16, 12), "tensor=8; choose a divisor of 12"),
    ((1, 8, 1), (2, 12, 16), "fsdp=8; choose a divisor of 12"),
  ],
)
def test_a_shape_that_does_not_divide_is_refused(sizes, shape, words):
  kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = {"encoder": {"layer": {"query": {"kernel": kernel}}}}
  with pytest.raises(UserError, match=words):
    param_shardings(tree, make_mesh(*sizes))


def test_put_keeps_values_and_splits_them():
  mesh = make_mesh(2, 2, 2)
  batch = {"x": np.arange(16).reshape(8, 2), "y": np.arange(8)}
  placed = put(batch, NamedSharding(mesh, BATCH))
  portion = portion_of(NamedSharding(mesh, BATCH))
  assert portion.bounds(8) == (0, 8)  # one process has all rows
  by_rows = put_rows(batch, NamedSharding(mesh, BATCH), portion)
  for name, array in placed.items():
    assert by_rows[name].sharding == array.sharding
    np.testing.assert_array_equal(by_rows[name], array)
  members = NamedSharding(mesh, PartitionSpec(None, *BATCH))
  stacked = {"x": np.arange(24).reshape(3, 8)}
  placed_behind = put_rows(stacked, members, portion)["x"]
  assert placed_behind.sharding == members
  np.testing.assert_array_equal(placed_behind, stacked["x"])
  for name, value in batch.items():
    np.testing.assert_array_equal(placed[name], value)
    shards = [s.data.shape[0] for s in placed[name].addressable_shards]
    assert shards == [2] * 8


@cache
def host_values(method):
  """The whole tree and the projections, as numpy."""
  model, variables = model_of(method), shapes_of(method)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = 0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
    return np.asarray(noise, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(draw, variables["params"])
  projections = {}
  if "projections" in variables:
    projections = model.adapter.projections(model.find_targets(IDS))
  return params, jax.tree.map(np.asarray, projections)


def batch_of():
  """A pass of two: eight rows of eight tokens, each two examples and a gap."""
  rng = np.random.default_rng(1)
  batch = {name: np.zeros((8, 8), np.int32) for name in INPUTS}
  batch["input_ids"] = rng.integers(1, 24, (8, 8)).astype(np.int32)
  batch["positions"][:] = [0, 1, 2, 3, 4, 0, 1, 2]
  batch["segment_ids"][:] = [1, 1, 1, 1, 1, 2, 2, 2]
  batch["cls_positions"] = np.tile(np.array([[0, 5, 0]], np.int32), (8, 1))
  weights = np.array([[1 / 32, 1 / 32, 0]], np.float32)
  batch["weights"] = np.tile(weights, (8, 1))
  batch["labels"] = rng.integers(0, 3, (8, 3)).astype(np.int32)
  return batch


def start(method, mesh):
  """The state, placed as a run places it, and the step; momentum has slots."""
  params, projections = host_values(method)
  labels = label_tree(params, method)
  trained = split(labels, labels)[0]
  params = put(params, param_shardings(params, mesh))
  trainable, rest = split(params, labels)
  everywhere = NamedSharding(mesh, REPLICATED)
  frozen = Frozen(rest, put(projections, everywhere))
  model = Model(
    module=model_of(method),
    labels=trained,
    counts=count(params, labels),
    trainable=trainable,
    frozen=frozen,
    digest=None,
    notes=(),
  )
  rule = optax.sgd(1.0, momentum=0.9)
  rules = {ADAPTER: rule, HEAD: rule, FROZEN: optax.set_to_zero()}
  tx = optax.partition(rules, trained)
  state = init_state(model, tx, mesh)
  step = jit_train_step(state, apply=model.module.apply, tx=tx)
  passes = put([batch_of()] * 2, NamedSharding(mesh, BATCH))
  return step, state, frozen, passes


def host(tree):
  return jax.tree.map(np.asarray, tree)


@cache
def on_one_device(method):
  """(params, loss) after a step, dropout included, without any mesh."""
  params, projections = host_values(method)
  labels = label_tree(params, method)
  trainable, frozen = split(params, labels)
  tx, module = optax.sgd(1.0), model_of(method)
  state = State(np.int32(0), trainable, tx.init(trainable))
  step = jax.jit(partial(train_step, apply=module.apply, tx=tx))
  after, metrics = step(
    state, Frozen(frozen, projections), [batch_of()] * 2, jax.random.key(3)
  )
  assert len(metrics["loss"].sharding.device_set) == 1
  return flatten_dict(host(after.params)), float(metrics["loss"])


@pytest.mark.parametrize("method", ["vera", "lora", "full"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_the_same_on_every_mesh(mesh, method):
  want, loss = on_one_device(method)
  step, state, frozen, passes = start(method, make_mesh(**MESHES[mesh]))
  before = jax.tree.map(lambda leaf: leaf.sharding, state)
  values = flatten_dict(host(state.params))
  state, metrics = step(state, frozen, passes, jax.random.key(3))
  np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
  for path, leaf in flatten_dict(state.params).items():
    np.testing.assert_allclose(
      leaf, want[path], atol=1e-5, err_msg="/".join(path)
    )
    assert np.abs(leaf - values[path]).max() > 0
  after = jax.tree.map(lambda leaf: leaf.sharding, state)
  for old, new, leaf in zip(
    *map(jax.tree.leaves, (before, after, state)), strict=True
  ):
    assert old.is_equivalent_to(new, leaf.ndim), leaf.shape


@pytest.mark.parametrize("method", ["vera", "full"])
def test_a_slot_lies_where_its_leaf_lies(method):
  _, state, _, _ = start(method, make_mesh(2, 2, 2))
  leaves = {
    tuple(key.key for key in path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  seen = 0
  for path, slot in jax.tree_util.tree_leaves_with_path(state.opt_state):
    names = tuple(k.key for k in path if hasattr(k, "key"))
    if names[1:] in leaves:
      seen += 1
      assert slot.sharding.is_equivalent_to(leaves[names[1:]], slot.ndim)
  assert seen == len(leaves)


@pytest.mark.smoke
def test_a_head_is_not_cut_in_two():
  check_heads(12, make_mesh(2, 1, 4))
  with pytest.raises(UserError, match="12 attention heads .* tensor=8"):
    check_heads(12, make_mesh(1, 1, 8))


def test_a_mesh_over_other_devices():
  some = jax.devices()[:4]
  assert make_mesh(-1, 2, 1, over=some).devices.shape == (2, 2, 1)
  with pytest.raises(UserError, match="does not fit the 4 devices"):
    make_mesh(8, over=some)
