"""One maker of adapters, for configs and for adapter files."""

import json

import jax
import numpy as np
import pytest

from vera_jax.adapters.interface import Target
from vera_jax.adapters.methods import make_adapter
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.train.model import build_adapter

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
  key = jax.random.key(0)
  first = {name: f(key) for name, f in adapter.init(6, 5).items()}
  return {**first, **adapter.projections({("query",): Target(6, 5)})}


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
  config = tiny_config(method=method)
  adapter, targets = build_adapter(config)
  written = json.loads(json.dumps(config[method].to_dict()))
  again, patterns = make_adapter(method, written)
  assert targets == patterns
  same(adapter, again)


@pytest.mark.parametrize("method", ["bitfit", "head", "full"])
def test_the_others_put_nothing_on(method):
  assert make_adapter(method, {"lr": 1e-3}) == (None, ())


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
