"""The step: what it trains, what it counts, and what it never computes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from tests.train.conftest import here, outputs, random_model
from vera_jax.data.packing import Layout, pack_runs
from vera_jax.data.tokens import Tokens
from vera_jax.tasks.classification import loss
from vera_jax.train.compiled_step import CompiledStep
from vera_jax.train.step import Frozen, State, microbatch_gradient, train_step

# The learning rate is 1: a leaf moves by its gradient.
TX = optax.sgd(1.0)
KEY = here(jax.random.key(5))


def random_tokens(seed, *, count=12):
  """Texts for the tiny model, of 3 to 11 tokens."""
  rng = np.random.default_rng(seed)
  lengths = np.array([11, *rng.integers(3, 12, count - 1)])
  return Tokens(
    ids=rng.integers(1, 24, lengths.sum()).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    token_types=rng.integers(0, 2, lengths.sum()).astype(np.int32),
    labels=rng.integers(0, 3, count).astype(np.int32),
    index=np.arange(count),
    truncated=0,
    pad_id=0,
    fingerprint="",
  )


@cache
def batch_of():
  """Four examples in two rows of three slots, two of which stay empty."""
  texts, layout = random_tokens(2, count=4), Layout((2,), 20, 3)
  (batch,) = pack_runs(texts, [np.arange(4)], layout)[0]
  return here(batch)


@cache
def ready(method, dropout=0.0):
  """The step, whose parts are compiled once for all tests, and what it takes:
  (step, the state it begins with, the frozen rest)."""
  # Factored: the other plans do make products of a kernel's shape.
  model = random_model(method, dropout=dropout, plan="factored")
  state = here(State(jnp.int32(0), model.trainable, TX.init(model.trainable)))
  step = CompiledStep(
    state, outputs=outputs(model), loss=loss, optimiser=lambda: TX
  )
  return step, state, Frozen(model.frozen, model.projections)


def after(method, *microbatches, number=0, key=KEY, dropout=0.0):
  """(state, metrics) of a step from the first state, which is not donated."""
  step, state, frozen = ready(method, dropout)
  state = jax.tree.map(jnp.copy, state._replace(step=here(jnp.int32(number))))
  return step(state, frozen, microbatches, key, {})


@pytest.mark.parametrize(
  "method",
  [pytest.param("vera", marks=pytest.mark.smoke), "head", "full"],
)
def test_only_trainable_leaves_are_returned_and_all_of_them_move(method):
  _, state, _ = ready(method)
  moved, metrics = after(method, batch_of())
  assert jax.tree.structure(moved) == jax.tree.structure(state)
  assert moved.step == 1
  squares = 0.0
  for path, leaf in flatten_dict(moved.params).items():
    move = np.asarray(leaf - flatten_dict(state.params)[path])
    squares += np.sum(move**2)
    if path[-2:] != ("key", "bias"):  # softmax cancels it
      assert np.abs(move).max() > 1e-6, path
  np.testing.assert_allclose(metrics["grad_norm"], squares**0.5, rtol=1e-4)


def rows_of(batch):
  """Each row as a microbatch of its own."""
  return [
    {name: array[row : row + 1] for name, array in batch.items()}
    for row in range(len(batch["weights"]))
  ]


def test_microbatches_add_up_to_the_step():
  """Their examples weigh alike, though the rows hold one and three of them."""
  batch = batch_of()
  assert batch["weights"].sum(axis=1).tolist() in ([1, 3], [3, 1])
  want, metrics = after("vera", batch)
  got, summed = after("vera", *rows_of(batch))
  assert got.step == 1
  for name, value in metrics.items():
    np.testing.assert_allclose(summed[name], value, rtol=1e-5)
  for one, two in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_what_is_packed_is_what_padding_would_give():
  """Logits, loss and gradient of random batches; one slot per row: padded."""
  _, state, frozen = ready("vera")
  run = outputs(random_model("vera", plan="factored"))

  @jax.jit
  def logits_and_sums(batch):
    logits, _ = run(state.params, frozen, batch)
    sums = microbatch_gradient(
      state.params, frozen, batch, KEY, outputs=run, loss=loss
    )
    return logits, sums

  def outcome(tokens, indices, layout):
    logits, each = np.zeros((12, 3)), []
    for batch in pack_runs(tokens, [indices], layout)[0]:
      out, sums = logits_and_sums(batch)
      each.append(sums)
      real = batch["example"] >= 0
      logits[batch["example"][real]] = out[real]
    sums = jax.tree.map(lambda *leaves: sum(leaves), *each)
    means = jax.tree.map(
      lambda leaf: leaf / sums.examples, [sums.loss, sums.grads]
    )
    return [logits, sums.examples, *jax.tree.leaves(means)], len(each)

  microbatches = []
  for seed in range(4):
    tokens = random_tokens(seed)
    indices = np.random.default_rng(seed).permutation(12)[: 12 - seed]
    want, one = outcome(tokens, indices, Layout((12,), 12, 1))
    got, some = outcome(tokens, indices, Layout((2,), 12, 4))
    assert one == 1 and got[1] == 12 - seed
    microbatches.append(some)
    for ours, padded in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, padded, atol=1e-5)
  assert len(set(microbatches)) > 1


@pytest.mark.parametrize("parts", [1, 4])
def test_a_penalty_counts_once_however_many_microbatches(parts):
  """Beside the mean loss of all examples, whatever they are split into."""
  params = {"w": jnp.float32(3.0)}
  labels = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  batch = {"labels": labels, "weights": np.ones((4, 2), np.float32)}
  rows = np.split(np.arange(4), parts)
  gradient = partial(
    microbatch_gradient,
    outputs=lambda params, frozen, batch, key: (
      params["w"] * jnp.ones((*batch["labels"].shape, 1)),
      10 * params["w"] ** 2,
    ),
    loss=loss,
  )
  after, metrics = train_step(
    State(jnp.int32(0), params, TX.init(params)),
    Frozen({}, {}),
    [
      {name: jnp.asarray(x[chosen]) for name, x in batch.items()}
      for chosen in rows
    ],
    KEY,
    {},
    gradient=gradient,
    optimiser=lambda: TX,
  )
  mean = np.mean((3 - labels) ** 2) + 10 * 3**2
  np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-6)
  gradient = np.mean(2 * (3 - labels)) + 20 * 3
  np.testing.assert_allclose(params["w"] - after.params["w"], gradient)


def test_dropout_follows_step_key_and_microbatch():
  """A microbatch alone, and the same behind another without examples."""
  batch = batch_of()
  nothing = {**batch, "weights": 0 * batch["weights"]}

  def found(*microbatches, **changes):
    _, metrics = after("head", *microbatches, dropout=0.3, **changes)
    return float(metrics["loss"])

  assert found(batch) == found(batch) == found(batch, nothing)
  others = [
    found(batch, number=1),
    found(batch, key=here(jax.random.key(6))),
    found(nothing, batch),
  ]
  assert len({found(batch), *others}) == 4


def test_evaluation_has_no_dropout():
  """Its logits give the training loss of the same model without dropout."""
  _, state, frozen = ready("head")
  run = outputs(random_model("head", dropout=0.3, plan="factored"))
  logits, _ = jax.jit(run)(state.params, frozen, batch_of())
  total, count = loss(logits, batch_of())
  _, metrics = after("head", batch_of())
  np.testing.assert_allclose(total / count, metrics["loss"], rtol=1e-5)


def test_a_step_never_has_the_frozen_weights_gradients():
  """No product of the shape of a frozen kernel, in any loop's body."""

  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        yield from (tuple(v.aval.shape) for v in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        yield from shapes(inner)

  def products(method):
    _, state, frozen = ready(method)
    run = outputs(random_model(method, plan="factored"))
    traced = jax.make_jaxpr(
      partial(microbatch_gradient, outputs=run, loss=loss)
    )(state.params, frozen, batch_of(), KEY)
    return set(shapes(traced.jaxpr))

  kernels = {(16, 32), (32, 16), (16, 16)}
  assert kernels & products("full")
  assert not kernels & products("vera")
  assert not kernels & products("lora")
