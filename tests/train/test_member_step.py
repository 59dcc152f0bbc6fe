"""The step of several members: what it costs, and what it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import SingleDeviceSharding

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.vera import vera
from vera_jax.models.bert import INPUTS, BertClassifier, BertConfig
from vera_jax.train.optim import optimiser
from vera_jax.train.step import (
  Frozen,
  State,
  jit_member_pass,
  member_pass,
  no_sums,
  pass_shapes,
  train_step,
)

# MiniLM's widths. No array is made of them.
MINILM = {
  "model_type": "bert",
  "vocab_size": 30522,
  "hidden_size": 384,
  "num_hidden_layers": 6,
  "num_attention_heads": 12,
  "intermediate_size": 1536,
  "max_position_embeddings": 512,
}
TINY = {
  **MINILM,
  "vocab_size": 60,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 48,
  "max_position_embeddings": 24,
}
RATES = {"adapter_lr": 0.01, "head_lr": 0.02, "weight_decay": 0.1}
HERE = SingleDeviceSharding(jax.devices()[0])


def shaped(tree, *, members=1):
  """Shapes on a device, behind a member axis where there are several."""
  front = (members,) if members > 1 else ()
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      front + leaf.shape, leaf.dtype, sharding=HERE
    ),
    tree,
  )


def model_of(fields):
  base = BertClassifier(BertConfig.from_dict(fields), 2)
  return adapt(base, vera(8), targets=["query", "value"])


def parts(fields):
  """apply, the maker of the optimiser, and the shapes of state and frozen."""
  model = model_of(fields)
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), ids)
  labels = label_tree(variables["params"], "vera")
  trainable, frozen = split(variables["params"], labels)
  make = partial(optimiser, split(labels, labels)[0], steps=10)
  slots = jax.eval_shape(make(**RATES).init, trainable)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  frozen = Frozen(frozen, variables["projections"])
  return model.apply, make, State(step, trainable, slots), frozen


def arguments(state, frozen, *, rows, length, slots, members):
  """What the step takes, as shapes."""
  batch = pass_shapes(rows, length, slots)
  sums = jax.eval_shape(no_sums, state.params)
  last = jax.ShapeDtypeStruct((), jnp.bool_)
  rates = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in RATES}
  key = jax.eval_shape(lambda: jax.random.key(0))
  own = partial(shaped, members=members)
  return (
    own(state),
    own(sums),
    shaped(frozen),
    own(batch),
    shaped(last),
    own(key),
    own(rates),
  )


def peak_bytes(members):
  """What XLA has of arguments, results and temporaries at once."""
  apply, make, state, frozen = parts(MINILM)
  given = arguments(state, frozen, rows=4, length=64, slots=4, members=members)
  step = jit_member_pass(given[0], apply=apply, optimiser=make, members=members)
  memory = step.lower(*given).compile().memory_analysis()
  assert memory.alias_size_in_bytes > 0  # the state is donated
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def test_eight_members_need_the_base_once():
  """Peak memory: the base and eight shares, and a tenth at most."""
  _, _, _, frozen = parts(MINILM)
  base = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
  one, eight = peak_bytes(1), peak_bytes(8)
  assert base < one < eight
  assert eight <= base + 8 * (one - base) * 1.1


def shapes_in(jaxpr):
  """Of every value, in the bodies of loops and calls too."""
  for equation in jaxpr.eqns:
    yield from (tuple(v.aval.shape) for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from shapes_in(inner)


@pytest.mark.smoke
def test_no_frozen_leaf_gets_a_member_axis():
  """A member count found nowhere else: no copy for each of the seven."""
  members = 7
  apply, make, state, frozen = parts(TINY)
  given = arguments(state, frozen, rows=5, length=24, slots=3, members=members)
  step = partial(member_pass, apply=apply, optimiser=make)
  traced = jax.make_jaxpr(jax.vmap(step, in_axes=(0, 0, None, 0, None, 0, 0)))
  seen = set(shapes_in(traced(*given).jaxpr))
  assert (members, 8) in seen  # d of a layer, for each
  # The shapes that only frozen leaves have, of a whole stack and of a layer.
  own = {TINY["vocab_size"], TINY["intermediate_size"]}
  leaves = {leaf.shape for leaf in jax.tree.leaves(frozen.params)}
  wide = {shape for shape in leaves if len(shape) > 1 and own & {*shape[-2:]}}
  assert len(wide) >= 3
  for shape in wide | {shape[-2:] for shape in wide}:
    for at in range(len(shape) + 1):
      assert (*shape[:at], members, *shape[at:]) not in seen, shape


def with_empty_rows(batch, count):
  """As packing leaves them where another member needs more rows."""
  return {name: jnp.pad(x, ((0, count), (0, 0))) for name, x in batch.items()}


def test_empty_rows_change_nothing_under_dropout():
  """Each row keeps its dropout mask: loss and update to float rounding."""
  model = model_of({**TINY, "hidden_dropout_prob": 0.3})
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(1, 2, (3, 8)) for name in INPUTS}
  batch["input_ids"] = rng.integers(0, 60, (3, 8))
  batch["positions"] = np.tile(np.arange(8), (3, 1))
  for name, high in (("cls_positions", 1), ("labels", 2)):
    batch[name] = rng.integers(0, high, (3, 1))
  batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
  batch["weights"] = jnp.full((3, 1), 1 / 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch["input_ids"])
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype),
    shapes,
  )
  labels = label_tree(variables["params"], "vera")
  trainable, frozen = split(variables["params"], labels)
  tx = optimiser(split(labels, labels)[0], **RATES, steps=9, warmup_ratio=0.0)
  step = jax.jit(partial(train_step, apply=model.apply, tx=tx))
  state = State(jnp.int32(0), trainable, tx.init(trainable))
  frozen = Frozen(frozen, variables["projections"])

  def after(batch, key=1):
    return step(state, frozen, (batch,), jax.random.key(key))

  (one, figures), (two, padded) = after(batch), after(with_empty_rows(batch, 5))
  for name in figures:
    np.testing.assert_allclose(figures[name], padded[name], rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(one.opt_state), jax.tree.leaves(two.opt_state), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)
  _, other = after(batch, key=2)
  assert abs(other["loss"] - figures["loss"]) > 1e-3  # dropout is on


@pytest.mark.parametrize("name", RATES)
def test_a_number_of_ones_own_is_the_constant(name):
  """An optimiser's number, traced, gives the update that it gives alone."""
  labels = {"layer": {"vera_b": "adapter"}, "classifier": {"kernel": "head"}}
  params = {
    "layer": {"vera_b": jnp.array([1.0, -2.0])},
    "classifier": {"kernel": jnp.array([[3.0]])},
  }
  grads = jax.tree.map(lambda x: 0.3 * x + 1, params)

  def update(rates):
    tx = optimiser(labels, **rates, steps=10, warmup_ratio=0.0)
    return tx.update(grads, tx.init(params), params)[0]

  many = jnp.array([0.0, 0.03, 0.5])
  rates = {k: jnp.full(3, x) for k, x in RATES.items()} | {name: many}
  got = jax.vmap(update)(rates)
  for i, value in enumerate(many):
    want = update({**RATES, name: float(value)})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-8)
