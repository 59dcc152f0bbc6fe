"""One step is the same step on any mesh; what doesn't fit is refused."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.conftest import here, outputs, random_model, tiny_blueprint
from vera_jax.adapters.labels import ADAPTER, FROZEN, HEAD, join
from vera_jax.errors import UserError
from vera_jax.pretrained.blueprint import abstract_model
from vera_jax.pretrained.sharding import (
  AXES,
  BATCH,
  REPLICATED,
  batch_shards,
  behind_runs,
  check_heads,
  make_mesh,
  param_shardings,
  process_shard,
  put,
  put_rows,
  splits_of,
)
from vera_jax.tasks.classification import loss
from vera_jax.train.compiled_step import (
  CompiledStep,
  init_state,
  state_shape,
)
from vera_jax.train.step import Frozen, State

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
  assert tuple(mesh.shape.values()) == (1, *shape)  # of runs
  assert tuple(mesh.shape) == AXES
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


def test_where_each_kind_of_leaf_lies():
  model = abstract_model(tiny_blueprint("vera"), mesh=make_mesh(2, 2, 2))
  placed = flatten_dict(join(model.trainable, model.frozen), sep="/")
  specs = {
    name: leaf.sharding.spec
    for name, leaf in placed.items()
    if leaf.sharding.spec != REPLICATED
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
  rules = tiny_blueprint("head").family.rules
  with pytest.raises(UserError, match=words):
    param_shardings(tree, make_mesh(*sizes), rules)


def test_large_leaves_without_a_rule_are_split():
  """LoRA's; and a vocabulary that does not divide is on every device."""
  tree = {
    "lora_A": jax.ShapeDtypeStruct((4, 64, 2**16), jnp.float32),
    "lora_B": jax.ShapeDtypeStruct((4, 2**16, 63), jnp.float32),
    "lm_head": {"embedding": jax.ShapeDtypeStruct((32001, 64), jnp.float32)},
  }
  rules = ((r"lm_head/embedding", ("tensor", "fsdp")),)
  placed = flatten_dict(param_shardings(tree, make_mesh(2, 2, 2), rules))
  assert [leaf.spec for leaf in placed.values()] == [
    PartitionSpec(None, None, "fsdp"),
    REPLICATED,
    PartitionSpec(None, "fsdp"),
  ]
  alone = flatten_dict(param_shardings(tree, make_mesh(4, 1, 2), rules))
  assert alone["lora_A",].spec == REPLICATED


def test_put_keeps_values_and_splits_them():
  rows = NamedSharding(make_mesh(2, 2, 2), BATCH)
  batch = {"x": np.arange(16).reshape(8, 2), "y": np.arange(8)}
  shard = process_shard(rows)
  assert shard.bounds(8) == (0, 8)  # one process has all rows
  for placed in (put(batch, rows), put_rows(batch, rows, shard)):
    for name, value in batch.items():
      assert placed[name].sharding == rows
      np.testing.assert_array_equal(placed[name], value)
      pieces = [s.data.shape[0] for s in placed[name].addressable_shards]
      assert pieces == [2] * 8
  stacked = {"x": np.arange(24).reshape(3, 8)}
  placed = put_rows(stacked, behind_runs(rows), shard)["x"]
  assert placed.sharding.spec == PartitionSpec("runs", *BATCH)
  np.testing.assert_array_equal(placed, stacked["x"])


def batch_of():
  """Eight rows of eight tokens, each two examples and a gap."""
  rng = np.random.default_rng(1)
  inputs = tiny_blueprint("head").family.inputs(8, 8, 3)
  batch = {name: np.zeros(x.shape, np.int32) for name, x in inputs.items()}
  batch["input_ids"] = rng.integers(1, 24, (8, 8)).astype(np.int32)
  batch["positions"][:] = [0, 1, 2, 3, 4, 0, 1, 2]
  batch["segment_ids"][:] = [1, 1, 1, 1, 1, 2, 2, 2]
  batch["cls_positions"][:] = [0, 5, 0]
  batch["weights"] = np.tile(np.array([[1, 1, 0]], np.float32), (8, 1))
  batch["labels"] = rng.integers(0, 3, (8, 3)).astype(np.int32)
  return batch


def momentum(model):
  """Descent whose slots have the leaves' shapes, apart by label."""
  rule = optax.sgd(1.0, momentum=0.9)
  rules = {ADAPTER: rule, HEAD: rule, FROZEN: optax.set_to_zero()}
  return optax.partition(rules, model.labels)


def stepped(model, state, batches):
  """(state, loss) after a step of two microbatches."""
  step = CompiledStep(
    state,
    outputs=outputs(model),
    loss=loss,
    optimiser=lambda: momentum(model),
  )
  frozen = Frozen(model.frozen, model.projections)
  state, metrics = step(state, frozen, batches, jax.random.key(3), {})
  return state, float(metrics["loss"])


@cache
def on_one_device(method):
  """(params, loss) after a step without any mesh."""
  model = random_model(method)
  params = jax.tree.map(jnp.copy, model.trainable)  # for it is donated
  slots = momentum(model).init(params)
  state = here(State(jnp.int32(0), params, slots))
  state, found = stepped(model, state, [here(batch_of())] * 2)
  return flatten_dict(jax.tree.map(np.asarray, state.params)), found


@pytest.mark.parametrize(
  "method, sizes",
  [
    ("vera", {"data": 2, "fsdp": 2, "tensor": 2}),
    pytest.param("vera", {"data": 8}, marks=pytest.mark.slow),
    pytest.param(
      "full", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow
    ),
  ],
)
def test_a_step_is_the_same_on_every_mesh(method, sizes):
  """Without dropout, whose masks depend on the mesh."""
  want, loss_of_one = on_one_device(method)
  mesh, model = make_mesh(**sizes), random_model(method)
  before = flatten_dict(model.trainable)
  plan = model.blueprint
  rules = plan.family.rules
  splits = FrozenDict(splits_of(plan.targets, mesh, rules))
  order = "folded_forward" if method == "vera" else "auto"
  module = plan.module.clone(splits=splits, plan=order)
  model = model._replace(blueprint=plan._replace(module=module))
  model = model._replace(
    trainable=put(
      model.trainable, param_shardings(model.trainable, mesh, rules)
    ),
    frozen=put(model.frozen, param_shardings(model.frozen, mesh, rules)),
    projections=put(model.projections, NamedSharding(mesh, REPLICATED)),
  )
  shape = state_shape(model, momentum(model), mesh)
  state = init_state(model.trainable, momentum(model), shape)
  batches = put([batch_of()] * 2, NamedSharding(mesh, BATCH))
  after, found = stepped(model, state, batches)
  np.testing.assert_allclose(found, loss_of_one, atol=1e-5)
  for path, leaf in flatten_dict(after.params).items():
    np.testing.assert_allclose(
      leaf, want[path], atol=1e-5, err_msg="/".join(path)
    )
    if path[-2:] != ("key", "bias"):  # softmax cancels it
      assert np.abs(leaf - np.asarray(before[path])).max() > 0
  for old, new in zip(*map(jax.tree.leaves, (shape, after)), strict=True):
    assert old.sharding.is_equivalent_to(new.sharding, new.ndim), new.shape


@pytest.mark.parametrize("method", ["vera", "full"])
def test_a_slot_lies_where_its_leaf_lies(method):
  mesh = make_mesh(2, 2, 2)
  model = abstract_model(tiny_blueprint(method), mesh=mesh)
  state = state_shape(model, momentum(model), mesh)
  leaves = {
    tuple(key.key for key in path): leaf.sharding
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  seen = 0
  for path, slot in jax.tree_util.tree_leaves_with_path(state.opt_state):
    names = tuple(k.key for k in path if hasattr(k, "key"))
    if names[1:] in leaves:
      seen += 1
      assert slot.sharding == leaves[names[1:]]
  assert seen == len(leaves)


@pytest.mark.smoke
def test_a_head_is_not_cut_in_two():
  check_heads(12, make_mesh(2, 1, 4))
  with pytest.raises(UserError, match="12 attention heads .* tensor=8"):
    check_heads(12, make_mesh(1, 1, 8))
  check_heads(1, make_mesh(8, 1, 1))
  with pytest.raises(UserError, match="tensor=8 .* has none, or one: set it"):
    check_heads(1, make_mesh(1, 1, 8))


def test_a_mesh_over_other_devices():
  some = jax.devices()[:4]
  assert make_mesh(-1, 2, 1, over=some).devices.shape == (1, 2, 2, 1)
  with pytest.raises(UserError, match="does not fit the 4 devices"):
    make_mesh(8, over=some)
