"""A batch of several adapters: its arrays, its gradients and its steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from vera_jax.adapters.apply import adapt
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.labels import label_tree, split
from vera_jax.adapters.vera import vera
from vera_jax.data.examples import Examples
from vera_jax.data.packing import (
  Layout,
  pack_by_adapter,
  pack_runs,
  place_all,
)
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import tokenise
from vera_jax.models.bert import BertClassifier, BertConfig
from vera_jax.operations.attention import INPUTS
from vera_jax.serve.bank import AdapterBank
from vera_jax.tasks.classification import loss
from vera_jax.train.multi_adapter import (
  empty_stack,
  mixed_logits,
  mixed_state,
  mixed_step,
)
from vera_jax.train.step import (
  Frozen,
  State,
  microbatch_gradient,
  outputs_of,
  train_step,
)

NAMES = ("one", "two", "three")
RNG = np.random.default_rng(0)
TEXTS = [
  " ".join(RNG.choice([f"word{i}" for i in range(25)], 1 + i % 12))
  for i in range(60)
]


@pytest.fixture
def bank(random_adapter):
  saved = load_adapter(random_adapter(task="sst2"))
  bank = AdapterBank(dict.fromkeys(NAMES, saved), capacity=5)
  rng = np.random.default_rng(1)
  bank.params = jax.tree.map(
    lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32),
    bank.params,
  )
  return bank


# Arrays and bytes


def array_shapes(jaxpr):
  """Shapes of all arrays that a program computes, inner programs' too."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
    for inner in jaxprs_in_params(eqn.params):
      yield from array_shapes(inner)


def batch_of(rows=5, length=24, slots=3):
  wide = {name: np.ones((rows, length), np.int32) for name in INPUTS}
  slotted = {"cls_positions": np.zeros((rows, slots), np.int32)}
  return {**wide, **slotted, "adapter": np.arange(rows, dtype=np.int32) % 3}


def kernels_by_row(method, scan):
  """Shapes with an axis of rows and a kernel's, A's or B's two axes."""
  config = BertConfig("bert", 30, 16, 2, 2, 32, 40, 0)
  targets = ["query", "value", "intermediate/dense"]
  model = adapt(
    BertClassifier(config, 2, scan=scan),
    vera(8),
    targets=targets,
    plan="factored",
  )
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), ids)
  params, pair = variables["params"], variables["projections"]
  trained, base = split(params, label_tree(params, method))
  stacked = jax.eval_shape(partial(empty_stack, capacity=4), trained)
  run = partial(mixed_logits, module=model, inputs=INPUTS)
  batch = batch_of(rows=5, length=24)
  jaxpr = jax.make_jaxpr(run)(stacked, Frozen(base, pair), batch).jaxpr
  matrices = {(8, 16), (32, 8), (16, 16), (16, 32), (32, 16)}
  matrices |= {shape[::-1] for shape in matrices}
  return [
    shape
    for shape in array_shapes(jaxpr)
    if 5 in shape[:-2] and shape[-2:] in matrices
  ]


@pytest.mark.parametrize("scan", [True, False])
def test_no_kernel_gets_an_axis_of_rows(scan):
  """Neither the base's nor A or B; and no product of them per row."""
  assert kernels_by_row("vera", scan) == []
  assert kernels_by_row("full", scan)  # here each row has its kernels


# Training


LABELS = np.arange(len(TEXTS), dtype=np.int32) % 2
KEY = jax.random.key(3)
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.02))
LAYOUT = Layout((12,), 32, 8)  # one shape, alone and mixed
STEPS = 3
BATCHES = [np.arange(12) + 12 * step for step in range(STEPS)]
# "three" has no example in the second step, and the last slots have none at all
NAMED = ["one", "two", "three"] * 4 + ["one", "two", "two"] * 4
NAMED += ["one", "one", "three", "two"] * 9


@pytest.fixture(scope="module")
def tokens(tiny_model):
  examples = Examples(TEXTS, None, LABELS, np.arange(len(TEXTS)))
  return tokenise(examples, load_tokenizer(tiny_model), 16, None)


@pytest.fixture
def model(bank):
  """The bank's module and inputs, without dropout: masks would differ."""
  module = bank.model["module"]
  config = dataclasses.replace(
    module.model.config,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )
  module = module.clone(model=module.model.clone(config=config))
  return {**bank.model, "module": module}


def leaves_of(tree, slot):
  return jax.tree.map(lambda leaf: leaf[slot], tree)


def on_device(batch):
  return jax.tree.map(jnp.asarray, batch)


def own_batches(tokens, name):
  """An adapter's own examples of each batch, packed without the others."""
  for indices in BATCHES:
    mine = [i for i in indices if NAMED[i] == name]
    if mine:
      (batch,) = pack_runs(tokens, [np.array(mine)], LAYOUT)[0]
      yield on_device(batch)


def mixed_batches(bank, tokens):
  slots = bank.slots(NAMED)
  for indices in BATCHES:
    yield on_device(pack_by_adapter(tokens, indices, slots, LAYOUT))


def test_steps_are_those_of_each_alone(bank, tokens, model):
  """Clipping, decay and moments too; without examples nothing changes."""
  start = jax.tree.map(np.array, bank.params)
  state = mixed_state(bank.params, TX)
  step = jax.jit(partial(mixed_step, tx=TX, **model), donate_argnums=0)
  losses = []
  for batch in mixed_batches(bank, tokens):
    state, metrics = step(state, bank.frozen, batch, KEY)
    losses.append(np.asarray(metrics["loss"]))
  bank.params = state.params

  outputs = partial(outputs_of, *model.values())
  run = jax.jit(
    partial(
      train_step,
      gradient=partial(microbatch_gradient, outputs=outputs, loss=loss),
      optimiser=lambda: TX,
    )
  )
  for name, slot in zip(NAMES, bank.slots(NAMES), strict=True):
    own = leaves_of(start, slot)
    state = State(jnp.int32(0), own, TX.init(own))
    single = []
    for batch in own_batches(tokens, name):
      state, metrics = run(state, bank.frozen, (batch,), KEY, {})
      single.append(metrics["loss"])
    mixed = [loss[slot] for loss in losses if not np.isnan(loss[slot])]
    assert len(mixed) == STEPS - (name == "three")
    np.testing.assert_allclose(mixed, single, rtol=1e-4)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    found = leaves_of(bank.params, slot)
    jax.tree.map(close, found, state.params)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, own)
    assert min(jax.tree.leaves(moved)) > 1e-4
  slot = 4  # no adapter's
  unchanged = leaves_of(bank.params, slot), leaves_of(start, slot)
  jax.tree.map(np.testing.assert_array_equal, *unchanged)
  assert np.isnan([loss[slot] for loss in losses]).all()


def test_rows_draw_their_own_dropout(bank):
  """Three rows of one text and one adapter."""
  batch = batch_of(rows=3, length=8, slots=1)
  batch["adapter"][:] = bank.slots(["one"])
  run = jax.jit(partial(mixed_logits, **bank.model))
  same = np.asarray(run(bank.params, bank.frozen, batch))
  np.testing.assert_allclose(same, same[:1].repeat(3, 0), rtol=0, atol=1e-6)
  drawn = np.asarray(run(bank.params, bank.frozen, batch, KEY))
  assert len(np.unique(drawn.round(4), axis=0)) == 3


# Rows


def test_no_row_holds_texts_of_two_adapters(tokens):
  slots = np.arange(len(TEXTS)) * 7 % 5
  place = place_all(tokens.lengths, LAYOUT, adapters=slots)
  for row in range(place.rows):
    here = place.row == row
    assert len(set(slots[here])) == 1
    assert tokens.lengths[here].sum() <= LAYOUT.length
    assert sorted(place.slot[here]) == list(range(here.sum()))
  batch = pack_by_adapter(
    tokens, np.arange(30, 50), slots, Layout((20,), 32, 8)
  )
  assert set(batch["example"][batch["example"] >= 0]) == set(range(30, 50))
  for adapter, examples in zip(batch["adapter"], batch["example"], strict=True):
    real = examples[examples >= 0]
    assert (slots[real] == adapter).all() if len(real) else adapter == -1
  with pytest.raises(ValueError, match="rows are needed"):
    pack_by_adapter(tokens, np.arange(30), slots, Layout((2,), 32, 8))
