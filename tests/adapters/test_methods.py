"""One maker of adapters, for configs and for adapter files."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vera_jax.adapters.adapted_product import adapted_product
from vera_jax.adapters.chain import chain
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.interface import Adapter, Site
from vera_jax.adapters.lora import lora
from vera_jax.adapters.methods import METHODS, make_adapter, settings_in
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.sites import arrays_at
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

VERA = {
  "rank": 4,
  "d_init": 1,
  "init": "uniform",
  "projection_seed": 3,
  "train": "both",
  "sharing": "shared",
  "conv": "whole",
  "targets": ["query"],
}


def made(adapter):
  """The projections and first values for one layer, and its kernel when these
  have moved."""
  site = Site(("query",), 6, 5, lambda: jnp.arange(30.0).reshape(6, 5))
  pair = adapter.shared({site.path: site}) if adapter.shared else {}
  shared = {**arrays_at(pair), **arrays_at(pair, site.path)}
  key, common = jax.random.key(0), {}
  if adapter.common:
    common = adapter.common(key, {site.path: site})
  site = site._replace(shared=shared, common=jax.tree.map(moved, common))
  own = adapter.init(key, site) if adapter.init else {}
  kernel, _ = adapter.weights(jax.tree.map(moved, own), site)
  return flatten_dict(pair, sep="/") | common | own | {"kernel": kernel}


def moved(leaf):
  return leaf + 0.1


def assert_same(one, two):
  one, two = made(one), made(two)
  assert one.keys() == two.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name])


def test_an_alpha_of_another_size_makes_another_kernel():
  with pytest.raises(AssertionError):
    assert_same(lora(2, alpha=4.0), lora(2, alpha=3.0))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_method_known_by_its_weights_may_follow_one_that_draws_nothing(order):
  own = Adapter(
    "own",
    init=lambda key, site: {"own_s": jnp.ones(())},
    weights=lambda leaves, site: (leaves["own_s"] * site.kernel(), site.bias),
  )
  both = chain(*((ia3(), own)[i] for i in order))
  site = Site(("query",), 6, 5, lambda: jnp.arange(30.0).reshape(6, 5))
  leaves, x = {"ia3_out": jnp.arange(5.0), "own_s": 0.5}, jnp.ones((2, 6))
  y, _ = adapted_product(both, leaves, site, x)
  want = 0.5 * jnp.arange(5.0)[None] * (x @ site.kernel())
  np.testing.assert_allclose(y, want, rtol=1e-6)
  with pytest.raises(UserError, match="own can't follow pvera, which draws"):
    chain(pvera(2), own)


def test_settings_make_the_method():
  adapter, targets = make_adapter("vera", VERA)
  assert targets == ("query",)
  assert_same(adapter, vera(4, d_init=1, init="uniform", projection_seed=3))


@pytest.mark.parametrize(
  "method",
  [*(m for m in METHODS if METHODS[m].on_sites), "vera+bitfit", "ia3+dvora"],
)
def test_a_config_and_its_json_make_the_same(tiny_config, method):
  settings = settings_in(tiny_config(method=method), method)
  adapter, targets = make_adapter(method, settings)
  written = json.loads(json.dumps(settings))
  again, patterns = make_adapter(method, written)
  assert targets == patterns
  assert_same(adapter, again)


@pytest.mark.parametrize("method", ["bitfit", "norms", "head", "full"])
def test_the_others_put_nothing_on(method):
  adapter, targets = make_adapter(method, {"lr": 1e-3, "biases": ".*"})
  assert (adapter.name, adapter.init, targets) == (method, None, ())


@pytest.mark.parametrize(
  "method, change, words",
  [
    ("dara", {}, "method is 'dara'; choose from vera, lora"),
    ("vera+dara", {}, "method is 'vera.dara'; choose from vera, lora"),
    ("vera+vera", {}, "each method can be there once"),
    ("vera+dvora", {}, "different methods, not vera . vera . magnitude"),
    ("vera+head", {}, "head adds nothing to a chain"),
    ("full+vera", {}, "full trains every weight"),
    ("ia3", {"feedforward": ["key"]}, "must be some of the targets"),
    ("ia3", {"feedforward": "query"}, "no usable feedforward='query'"),
    ("bitfit", {"biases": 3}, "no usable biases=3"),
    ("bitfit", {"biases": "("}, "no proper regular expression"),
    ("vera", {"rank": None}, "no usable rank=None"),
    ("vera", {"rank": True}, "no usable rank=True"),
    ("vera", {"d_init": "a"}, "no usable d_init='a'"),
    ("vera", {"rank": 0}, "rank is 0"),
    ("vera", {"targets": "query"}, "no usable targets='query'"),
    ("vera", {"targets": []}, "no usable targets="),
    ("lora", {"rank": 2}, "no usable alpha=None"),
  ],
)
def test_what_is_wrong_is_named(method, change, words):
  settings = {**VERA, **change}
  if "+" in method:
    settings = dict.fromkeys(method.split("+"), settings)
  with pytest.raises(UserError, match=words.replace("[", r"\[")):
    make_adapter(method, settings)


def test_a_chains_settings_are_there_for_each_method(tiny_config):
  with pytest.raises(UserError, match="have none for bitfit"):
    make_adapter("vera+bitfit", {"vera": VERA})
  config = tiny_config().to_dict()
  del config["ia3"]
  with pytest.raises(UserError, match="no group 'ia3', from which ia3 takes"):
    settings_in(config, "vera+ia3")


def test_each_method_of_a_chain_is_on_its_own_targets():
  """And VeRA's pair is only as wide as its own sites are."""
  settings = {
    "dvora": VERA,
    "ia3": {"targets": ["query", "wide"], "feedforward": ["wide"]},
  }
  adapter, targets = make_adapter("dvora+ia3", settings)
  assert targets == ("query", "wide")
  sites = {
    (name,): Site((name,), inputs, 5, partial(jnp.ones, (inputs, 5)))
    for name, inputs in (("query", 6), ("wide", 9))
  }
  pair = adapter.shared(sites)
  assert pair["A"].shape == (4, 6)
  leaves = {
    path: adapter.init(jax.random.key(0), site._replace(shared=pair))
    for path, site in sites.items()
  }
  shapes = jax.tree.map(jnp.shape, leaves)
  assert shapes[("query",)] == {
    "vera_d": (4,),
    "vera_b": (5,),
    "magnitude_m": (5,),
    "ia3_out": (5,),
  }
  assert shapes[("wide",)] == {"ia3_in": (9,)}
