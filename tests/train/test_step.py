"""The step: what it trains, what it counts, and what it never computes."""

from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera
from vera_jax.data.packing import Layout, pack
from vera_jax.data.tokens import Tokens
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.train.step import (
  INPUTS,
  Frozen,
  State,
  add_pass,
  eval_step,
  jit_train_pass,
  jit_train_step,
  no_sums,
  train_step,
  weighted_loss,
)

# Factored: the other plans do make products of a kernel's shape.
ADAPTERS = {"vera": vera(4, plan="factored"), "lora": lora(2)}
METHODS = ("vera", "lora", "bitfit", "head", "full")
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
KEY = jax.random.key(5)
LENGTHS = (5, 3, 7, 4)
# Where the four examples lie when packed: row, first column, slot.
PLACES = ((0, 0, 0), (0, 5, 1), (1, 0, 0), (1, 7, 1))


def model_of(method, *, labels=3, dropout=0.0):
  config = BertConfig.from_dict(
    {
      "model_type": "bert",
      "vocab_size": 24,
      "hidden_size": 16,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "intermediate_size": 32,
      "max_position_embeddings": 12,
      "hidden_dropout_prob": dropout,
      "attention_probs_dropout_prob": dropout,
    }
  )
  base = BertClassifier(config, labels)
  if method in ADAPTERS:
    return adapt(base, ADAPTERS[method], targets=["query", "value"])
  return base


@cache
def parts(method, **settings):
  """apply, the state under plain descent, the frozen rest, the optimiser."""
  model = model_of(method, **settings)
  variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = 0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
    return jnp.asarray(noise, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(draw, variables["params"])
  trainable, frozen = split(params, label_tree(params, method))
  projections = {}
  if "projections" in variables:
    projections = model.adapter.projections(model.find_targets(IDS))
  tx = optax.sgd(1.0)
  state = State(jnp.int32(0), trainable, tx.init(trainable))
  return model.apply, state, Frozen(frozen, projections), tx


def batch_of(packed, regression=False):
  """Four examples, one a row or two a row; empty slots hold nonsense."""
  rng = np.random.default_rng(1)
  labels = rng.normal(size=4) if regression else np.array([0, 2, 1, 2])
  places = PLACES if packed else [(row, 0, 0) for row in range(4)]
  rows, length, slots = (2, 12, 3) if packed else (4, 8, 1)
  batch = {name: np.zeros((rows, length), np.int32) for name in INPUTS[:4]}
  batch["cls_positions"] = np.zeros((rows, slots), np.int32)
  batch["weights"] = np.zeros((rows, slots))
  batch["labels"] = np.full((rows, slots), 1, labels.dtype)
  for i, ((row, at, slot), n) in enumerate(zip(places, LENGTHS, strict=True)):
    cells = row, slice(at, at + n)
    batch["input_ids"][cells] = rng.integers(1, 24, n)
    batch["token_type_ids"][cells] = np.arange(n) > 2
    batch["positions"][cells] = np.arange(n)
    batch["segment_ids"][cells] = slot + 1
    batch["cls_positions"][row, slot] = at
    batch["weights"][row, slot] = 1 / 4
    batch["labels"][row, slot] = labels[i]
  return {
    k: jnp.asarray(v, jnp.float32 if v.dtype == float else jnp.int32)
    for k, v in batch.items()
  }


def in_passes(batch, *bounds):
  """The rows of a batch between the bounds, as passes of a step."""
  return [
    {name: array[first:last] for name, array in batch.items()}
    for first, last in pairwise((0, *bounds))
  ]


def jitted(method, **settings):
  apply, state, frozen, tx = parts(method, **settings)
  return jax.jit(partial(train_step, apply=apply, tx=tx)), state, frozen


@pytest.mark.parametrize(
  "method", [pytest.param("vera", marks=pytest.mark.smoke), *METHODS[1:]]
)
def test_only_trainable_leaves_are_returned_and_all_of_them_move(method):
  step, state, frozen = jitted(method)
  after, metrics = step(state, frozen, [batch_of(packed=True)], KEY)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert after.step == 1
  squares = 0.0
  for path, leaf in flatten_dict(after.params).items():
    move = np.asarray(leaf - flatten_dict(state.params)[path])
    squares += np.sum(move**2)
    if path[-2:] != ("key", "bias"):  # softmax cancels it
      assert np.abs(move).max() > 1e-6, path
  np.testing.assert_allclose(metrics["grad_norm"], squares**0.5, rtol=1e-4)


@pytest.mark.parametrize(
  "method, regression", [("vera", False), ("full", False), ("head", True)]
)
def test_a_packed_step_is_the_padded_step(method, regression):
  settings = {"labels": 1} if regression else {}
  step, state, frozen = jitted(method, **settings)
  one, two = (
    step(state, frozen, [batch_of(packed, regression)], KEY)
    for packed in (True, False)
  )
  np.testing.assert_allclose(one[1]["loss"], two[1]["loss"], atol=1e-5)
  for path, leaf in flatten_dict(one[0].params).items():
    other = flatten_dict(two[0].params)[path]
    np.testing.assert_allclose(leaf, other, atol=1e-5, err_msg=str(path))


def test_passes_add_up_to_the_step():
  """Four rows at once, or one, one and two, compiled a pass at a time."""
  step, state, frozen = jitted("vera")
  batch = batch_of(packed=False)
  want, figures = step(state, frozen, [batch], KEY)
  apply, _, _, tx = parts("vera")
  state = jax.tree.map(jnp.copy, state)  # for it is donated
  step = jit_train_step(state, apply=apply, tx=tx)
  got, metrics = step(state, frozen, in_passes(batch, 1, 2, 4), KEY)
  assert got.step == 1
  for name, value in figures.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  for one, two in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-5)


def random_tokens(seed):
  """Twelve texts for the tiny model, of 3 to 11 tokens."""
  rng = np.random.default_rng(seed)
  lengths = np.array([11, *rng.integers(3, 12, 11)])
  return Tokens(
    ids=rng.integers(1, 24, lengths.sum()).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    token_types=rng.integers(0, 2, lengths.sum()).astype(np.int32),
    labels=rng.integers(0, 3, 12).astype(np.int32),
    index=np.arange(12),
    truncated=0,
    pad_id=0,
    fingerprint="",
  )


def test_what_is_packed_is_what_padding_would_give():
  """Logits, loss and gradient of random batches; one slot a row is padding."""
  apply, state, frozen, _ = parts("vera")
  add = jax.jit(partial(add_pass, apply=apply))
  evaluate = jax.jit(partial(eval_step, apply=apply))

  def outcome(tokens, indices, layout):
    logits, sums = np.zeros((12, 3)), no_sums(state.params)
    for batch in pack(tokens, indices, layout):
      out = np.asarray(evaluate(state.params, frozen, batch))
      real = batch["example"] >= 0
      logits[batch["example"][real]] = out[real]
      sums = add(state, sums, frozen, batch, KEY)
    return [logits, sums.loss, *jax.tree.leaves(sums.grads)], sums.passes

  passes = []
  for seed in range(4):
    tokens = random_tokens(seed)
    indices = np.random.default_rng(seed).permutation(12)[: 12 - seed]
    want, one = outcome(tokens, indices, Layout((12,), 12, 1))
    got, some = outcome(tokens, indices, Layout((1, 3), 24, 9))
    assert one == 1
    passes.append(int(some))
    for ours, padded in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, padded, atol=1e-5)
  assert len(set(passes)) > 1


def test_the_loss_of_classes_by_hand():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
  labels = np.array([[0, 3, 1], [2, 0, 0]], np.int32)
  weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32) / 3
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = -np.mean(np.log([shares[0, 0, 0], shares[0, 1, 3], shares[1, 0, 2]]))
  got = weighted_loss(*map(jnp.asarray, (logits, labels, weights)))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_loss_of_a_regression_by_hand():
  logits = jnp.asarray([[[1.0], [jnp.inf]], [[-2.0], [0.5]]])
  labels = jnp.asarray([[3.0, 100.0], [-1.0, 0.0]])
  weights = jnp.asarray([[1, 0], [1, 1]]) / 3
  want = (2.0**2 + 1.0**2 + 0.5**2) / 3
  np.testing.assert_allclose(
    weighted_loss(logits, labels, weights), want, rtol=1e-6
  )
  assert weighted_loss(logits, labels, jnp.zeros((2, 2))) == 0


def test_dropout_follows_the_step_and_the_key():
  step, state, frozen = jitted("head", dropout=0.3)
  batch = batch_of(packed=True)

  def loss(number, key):
    at = state._replace(step=jnp.int32(number))
    return float(step(at, frozen, [batch], key)[1]["loss"])

  assert loss(0, KEY) == loss(0, KEY)
  assert len({loss(0, KEY), loss(1, KEY), loss(0, jax.random.key(6))}) == 3


def test_passes_have_dropout_of_their_own():
  """One and the same pass, alone and after another of weight zero."""
  step, state, frozen = jitted("head", dropout=0.3)
  batch = batch_of(packed=True)
  nothing = {**batch, "weights": jnp.zeros_like(batch["weights"])}
  seen = {
    float(step(state, frozen, passes, KEY)[1]["loss"])
    for passes in ([batch], [nothing, batch])
  }
  assert len(seen) == 2


def test_evaluation_has_no_dropout():
  """Its logits give the training loss of the same model without dropout."""
  batch = batch_of(packed=True)
  apply, state, frozen, _ = parts("head", dropout=0.3)
  logits = jax.jit(partial(eval_step, apply=apply))(state.params, frozen, batch)
  assert logits.shape == (2, 3, 3)
  step, state, frozen = jitted("head")
  loss = step(state, frozen, [batch], KEY)[1]["loss"]
  got = weighted_loss(logits, batch["labels"], batch["weights"])
  np.testing.assert_allclose(got, loss, rtol=1e-5)


def size_in_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_step_never_has_the_frozen_weights_gradients():
  """No product of the shape of a frozen kernel, in any loop's body."""

  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        yield from (tuple(v.aval.shape) for v in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        yield from shapes(inner)

  def products(method):
    step, state, frozen = jitted(method)
    traced = jax.make_jaxpr(step)(state, frozen, [batch_of(packed=True)], KEY)
    return set(shapes(traced.jaxpr))

  kernels = {(16, 32), (32, 16), (16, 16)}
  assert kernels & products("full")
  assert not kernels & products("vera")
  assert not kernels & products("lora")


def test_a_step_of_vera_costs_less_than_one_of_full():
  """By XLA's own count of FLOPs and of bytes, donation included."""
  costs = {}
  for method in ("vera", "full"):
    apply, state, frozen, tx = parts(method)
    step = jit_train_pass(state, apply=apply, tx=tx)
    sums, batch = no_sums(state.params), batch_of(packed=True)
    compiled = step.lower(state, sums, frozen, batch, True, KEY).compile()
    memory = compiled.memory_analysis()
    changed = state, sums
    outputs = len(jax.tree.leaves(changed)) + 2
    # The loss, the norm, and a pointer for each output.
    bound = size_in_bytes(changed) + 8 + 8 * outputs
    assert memory.output_size_in_bytes <= bound
    assert memory.alias_size_in_bytes == size_in_bytes(changed)
    costs[method] = compiled.cost_analysis()["flops"]
  assert costs["vera"] < 0.85 * costs["full"]
