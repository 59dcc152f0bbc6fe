"""What the search for targets finds in a model, and why it refuses the rest."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from tests.adapters.adapted_networks import IDS, RANK, RNG, Ready
from tests.adapters.architectures import (
  Bypassed,
  CastEinsum,
  Decoder,
  Tied,
  Twice,
  Unbound,
)
from vera_jax.adapters.apply import adapt, find_targets
from vera_jax.adapters.interface import PLANS
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError


class Renamed(nn.Dense):
  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    return x @ self.param("w", nn.initializers.ones, shape)


def test_a_derived_class_without_the_layers_kernel_is_refused():
  model = nn.Sequential([Renamed(3), nn.Dense(2)])
  with pytest.raises(UserError, match="layers_0: .*no parameter 'kernel'"):
    find_targets(model, ["layers_0"], jnp.ones((2, 4)))


class Named(nn.Dense):
  """Its own call takes a dictionary of arrays."""

  def __call__(self, batch):
    return super().__call__(batch["x"])


def test_a_derived_layer_may_be_called_with_a_dictionary():
  batch = {"x": jnp.ones((2, 4))}
  targets = find_targets(nn.Sequential([Named(3)]), ["layers_0"], batch)
  (target,) = targets.values()
  assert (target.inputs, target.outputs) == (4, 3)


@pytest.mark.parametrize(
  "model, target, message",
  [
    (
      Decoder(CastEinsum),
      "gating_einsum",
      "mlp/gating_einsum: its gating_einsum is",
    ),
    (Decoder(CastEinsum), "mlp", "_1/mlp: its gating_einsum is read without"),
    (Bypassed(), "out", "out: it is called only while the model is init"),
    (Tied(), "table", "table: its embedding is also read without a call"),
    (Tied(unbound=True), "table", "table: its embedding is also read without"),
    (Twice(), "turned", "turned: its calls see its kernel in different ways"),
  ],
)
def test_what_calls_do_not_show_is_no_target(model, target, message):
  """The message says why, and lists what else there is."""
  x = IDS if isinstance(model, Decoder | Tied) else jnp.ones((2, 4))
  with pytest.raises(UserError, match=rf"(?s){message}.*adapted are:\n  \w"):
    adapt(model, vera(RANK), targets=[target]).find_targets(x)


class Own(nn.Module):
  """A layer of somebody's own, as T5X has them."""

  @nn.compact
  def __call__(self, x):
    first = nn.initializers.normal()
    return x @ self.param("kernel", first, (x.shape[-1], 3))


class OwnLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Own(name="query")(Own(name="key")(x))


@pytest.mark.parametrize("target", ["query", "q", ".*"])
def test_a_model_without_known_layers_says_so_of_each(target):
  with pytest.raises(UserError) as error:
    find_targets(OwnLayers(), [target], jnp.ones((2, 4)))
  told = str(error.value)
  assert "No layer of this model can be adapted:\n  key: its kernel is" in told
  assert "\n  query: its kernel is read without a call of a known layer" in told


def test_a_model_without_matrices_says_so():
  with pytest.raises(UserError, match="The model has no layer with a matrix"):
    find_targets(nn.LayerNorm(), [".*"], jnp.ones((2, 4)))


def test_every_layer_is_asked_for_without_those_never_called():
  """One pattern names none in particular."""
  found = find_targets(Bypassed(), [".*"], jnp.ones((2, 4)))
  assert {*found} == {("first",)}


@pytest.mark.parametrize(
  "model, target, x",
  [
    (Tied(unbound=True), "first", IDS),
    (Unbound(), "layers_0", jnp.ones((2, 4))),
    (Twice(), "last", jnp.ones((2, 4))),
  ],
)
def test_other_layers_beside_what_is_refused(model, target, x):
  """And what a model applies unbound is left alone."""
  ready = Ready(model, vera(RANK), [target], x)
  assert [*ready.targets] == [(target,)]
  ready.check()


class Equation(nn.Module):
  equation: str
  shape: tuple[int, ...]
  more: str = ""

  @nn.compact
  def __call__(self, x):
    y = Multiplied(self.shape, self.more, name="layer")(self.equation, x)
    return nn.Dense(2, name="other")(y.reshape(len(x), -1))


class Multiplied(nn.Module):
  shape: tuple[int, ...]
  more: str

  @nn.compact
  def __call__(self, eqn, x):
    w = self.param("w", nn.initializers.normal(1.0), self.shape)
    y = jnp.einsum(eqn, x, w.swapaxes(0, 1) if self.more == "turned" else w)
    return 3 * y if self.more == "scaled" else y


@pytest.mark.parametrize(
  "equation, shape, reason",
  [
    ("BTD,TDF->BTF", (3, 4, 2), "have T: each entry has a kernel of its own"),
    ("BTD,DF->BF", (4, 2), "is no product of x's rows and a matrix"),
    ("BTD,DFG->BTF", (4, 2, 2), "is no product of x's rows and a matrix"),
    ("BTT,TF->BTF", (4, 2), "an axis is there twice"),
  ],
)
def test_equations_that_are_no_product_of_rows(equation, shape, reason):
  x = jnp.ones((2, 4, 4) if "TT" in equation else (2, 3, 4))
  with pytest.raises(UserError, match=reason):
    find_targets(Equation(equation, shape), ["layer"], x)


@pytest.mark.parametrize("more", ["", "scaled", "turned"])
def test_dots_in_an_equation_and_what_else_a_module_does(more):
  """Of a module that does more than multiply its own call is kept: also where
  a square kernel is turned, which no shape tells."""
  model = Equation("...F,NHF->...NH", (3, 3, 4), more)
  x = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
  ready = Ready(model, vera(RANK), ["layer"], x)
  ready.check()
  view = ready.targets["layer",].view
  assert view.plans == (("folded",) if more else PLANS)
