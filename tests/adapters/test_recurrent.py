"""Recurrent cells, whose deltas are folded before the loop over time."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.adapters.adapted_networks import (
  RANK,
  RNG,
  Ready,
  by_definition,
  plain,
)
from tests.adapters.architectures import CELLS, Nested, Recurrent
from tests.slow import rest_is_slow
from vera_jax.adapters.apply import find_targets
from vera_jax.adapters.chain import chain
from vera_jax.adapters.counting import adapter_size, plans_at
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.intercept import KEYS
from vera_jax.adapters.lora import lora
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.targets import trace_sites
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

SEQUENCE = jnp.asarray(RNG.normal(size=(3, 6, 2)), jnp.float32)


@pytest.mark.parametrize("cell", rest_is_slow(CELLS))
def test_recurrent_cells(cell):
  """Kernels on the input's side and on the state's alike."""
  ready = Ready(Recurrent(cell), vera(RANK), ["cell/.*"], SEQUENCE)
  gates = {"gru": 3, "simple": 1, "mgu": 2}.get(cell, 4)
  size = adapter_size(ready.adapter, ready.targets)
  assert size == 2 * gates * (RANK + 4)
  (found,) = ready.check("folded").values()
  ready.check_gradients(found, by_definition)


def loops(jaxpr):
  """The operands' shapes of all products inside loops of a program."""
  for equation in jaxpr.eqns:
    inner = [x for x in equation.params.values() if hasattr(x, "jaxpr")]
    for one in inner:
      inside = equation.primitive.name in ("scan", "while")
      yield from products(one.jaxpr) if inside else loops(one.jaxpr)


def products(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield tuple(x.aval.shape for x in equation.invars)
    for one in equation.params.values():
      if hasattr(one, "jaxpr"):
        yield from products(one.jaxpr)


@pytest.mark.parametrize(
  "cell, method",
  [("lstm", vera(RANK)), ("optimised", vera(RANK)), ("gru", lora(RANK))],
  ids=["lstm, vera", "optimised, vera", "gru, lora"],
)
def test_deltas_are_made_before_the_loop_over_time(cell, method):
  """In a step of training no product in a loop is of the rank's width, and
  there are as many as when the kernels themselves are trained."""
  x = jnp.zeros((3, 40, 2))
  ready = Ready(Recurrent(cell), method, ["cell/.*"], x)
  flat = flatten_dict(ready.start)

  def loss(trained, outputs):
    return jnp.sum(outputs(unflatten_dict({**flat, **trained})))

  def in_loops(names, outputs):
    trained = {p: x for p, x in flat.items() if names(p)}
    program = jax.make_jaxpr(jax.grad(partial(loss, outputs=outputs)))(trained)
    return list(loops(program.jaxpr)), list(products(program.jaxpr))

  inside, everywhere = in_loops(lambda p: method.owns(p[-1]), ready.adapted)
  own, _ = in_loops(
    lambda p: p[-1] == "kernel" and "cell" in p,
    lambda params: plain(ready.model, ready.base(params), x),
  )
  assert sorted(inside) == sorted(own) and inside
  assert not any(RANK in shape for pair in inside for shape in pair)
  assert any(RANK in shape for pair in everywhere for shape in pair)


def test_one_step_of_a_cell_is_factored_where_that_is_cheaper():
  """As when a text is written sign by sign; a bank never folds."""
  ready = Ready(Recurrent("gru"), vera(1), ["cell/.*"], SEQUENCE[:1, :1])
  program = str(jax.make_jaxpr(ready.adapted)(ready.moved))
  assert "f32[1,1]" in program  # x times A, of rank 1
  for cell in ("lstm", "optimised"):
    made = Ready(
      Recurrent(cell), vera(RANK, sharing="unique"), ["cell/.*"], SEQUENCE
    )
    if cell == "lstm":
      got = jax.jit(partial(made.adapted, plan="factored"))(made.moved)
      merged = plain(made.model, made.merged(made.moved), SEQUENCE)
      np.testing.assert_allclose(got, merged, rtol=0, atol=1e-5)
    else:
      with pytest.raises(UserError, match="DenseParams.*no factored plan"):
        jax.eval_shape(partial(made.adapted, plan="factored"), made.moved)


@pytest.mark.parametrize("rank, plan", [(RANK, "folded"), (1, "factored")])
def test_a_cells_plan_is_the_one_that_a_run_prints(rank, plan):
  """By the rows of all steps; no delta is made in a step."""
  method, patterns = vera(rank), ["cell/h.*"]
  ready = Ready(Recurrent("gru"), method, patterns, SEQUENCE)
  targets, calls, _ = trace_sites(ready.model, patterns, SEQUENCE)
  tokens = {path: call.tokens for path, call in calls.items()}
  assert set(tokens.values()) == {3 * 6}
  assert set(plans_at(method, targets, tokens).values()) == {plan}
  inside = list(loops(jax.make_jaxpr(ready.adapted)(ready.moved).jaxpr))
  assert (((3, 4), (4, rank)) in inside) == (plan == "factored")
  assert ((4, rank), (rank, 4)) not in inside


@pytest.mark.parametrize(
  "method, x, plans",
  [
    (lora(1), SEQUENCE, {"folded"}),
    (lora(1), SEQUENCE[:1, :1], {"factored"}),
    (ia3(), SEQUENCE, set()),
  ],
  ids=["lora, folded", "lora, factored", "ia3"],
)
@pytest.mark.slow
def test_a_cell_in_a_cell(method, x, plans):
  """Its kernels are made with those of the outer one, once for all steps."""
  ready = Ready(Nested(), method, [".*"], x)
  ready.check()
  targets, calls, _ = trace_sites(ready.model, [".*"], x)
  tokens = {path: call.tokens for path, call in calls.items()}
  assert {path[1] for path in targets} == {"inner", "logits"}
  assert set(tokens.values()) == {x.shape[0] * x.shape[1]}
  assert set(plans_at(method, targets, tokens).values()) >= plans


class Turned(nn.RNNCellBase):
  @nn.compact
  def __call__(self, carry, x):
    turned = nn.Einsum((2, 2), "BD,ED->BE", use_bias=False, name="turned")
    carry = nn.tanh(nn.Dense(2, name="h")(carry) + turned(x))
    return carry, carry

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    return jnp.ones(input_shape)

  @property
  def num_feature_axes(self):
    return 1


def test_an_equation_that_turns_its_kernel_in_a_cell_is_refused():
  """A square kernel's delta would be added the wrong way round."""
  model = nn.RNN(Turned(name="cell"))
  with pytest.raises(UserError, match="turned: it lies in a recurrent cell"):
    find_targets(model, ["turned"], SEQUENCE)
  Ready(model, ia3(), [".*"], SEQUENCE).check()  # without that layer


def test_random_numbers_in_a_cell():
  """nn.RNN passes keys to its cell only if it is told to."""
  options = FrozenDict(split_rngs=FrozenDict({"params": False, KEYS: True}))
  for cell, given, message in (
    ("gru", FrozenDict(), "pvera draws .* from its cell cell: .*'adapter'"),
    ("optimised", options, "DenseParams .* can only be folded"),
    ("gru", options, None),
  ):
    model = Recurrent(cell, given)
    ready = Ready(model, pvera(RANK), ["cell/.*"], SEQUENCE)
    variables = {"params": ready.moved, "projections": ready.projections}
    run = partial(
      ready.module.apply, variables, SEQUENCE, rngs={KEYS: jax.random.key(1)}
    )
    if message is None:
      still = plain(model, ready.merged(ready.moved), SEQUENCE)
      assert np.abs(jax.jit(run)() - still).max() > 1e-3
    else:
      with pytest.raises(UserError, match=message):
        jax.eval_shape(run)


def test_a_cell_without_random_numbers_in_it_needs_no_keys():
  """PVeRA draws them in another layer of the network."""
  method = chain(
    pvera(RANK)._replace(on=("classifier",)), ia3()._replace(on=("cell/.*",))
  )
  ready = Ready(
    Recurrent("optimised"), method, ["cell/.*", "classifier"], SEQUENCE
  )
  variables = {"params": ready.moved, "projections": ready.projections}
  run = partial(ready.module.apply, variables, SEQUENCE)
  key = jax.random.key(1)
  assert jax.eval_shape(lambda: run(rngs={KEYS: key})).shape == (3, 6, 3)
