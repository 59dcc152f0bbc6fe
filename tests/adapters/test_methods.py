"""One maker of adapters, for configs and for adapter files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.adapters.interface import Site
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

VERA = {
  "rank": 4,
  "d_init": 1,
  "init": "uniform",
  "projection_seed": 3,
  "train": "both",
  "sharing": "shared",
  "targets": ["query"],
}


def made(adapter):
  """The projections and first values for one layer."""
  site = Site(("query",), 6, 5, lambda: jnp.zeros((6, 5)))
  first = adapter.init(jax.random.key(0), site)
  return first | (adapter.shared({site.path: site}) if adapter.shared else {})


def same(one, two):
  one, two = made(one), made(two)
  assert one.keys() == two.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name])


def test_settings_make_the_method():
  adapter, targets = make_adapter("vera", VERA)
  assert targets == ("query",)
  same(adapter, vera(4, d_init=1, init="uniform", projection_seed=3))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_a_config_and_its_json_make_the_same(tiny_config, method):
  settings = tiny_config(method=method)[method].to_dict()
  adapter, targets = make_adapter(method, settings)
  written = json.loads(json.dumps(settings))
  again, patterns = make_adapter(method, written)
  assert targets == patterns
  same(adapter, again)


@pytest.mark.parametrize("method", ["bitfit", "head", "full"])
def test_the_others_put_nothing_on(method):
  adapter, targets = make_adapter(method, {"lr": 1e-3})
  assert (adapter.name, adapter.init, targets) == (method, None, ())


@pytest.mark.parametrize(
  "method, change, words",
  [
    ("dora", {}, "method is 'dora'; choose from vera, lora"),
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
  with pytest.raises(UserError, match=words.replace("[", r"\[")):
    make_adapter(method, {**VERA, **change})
