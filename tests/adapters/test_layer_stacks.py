"""Layers' tensors stacked and taken apart: the same bits, few names."""

import numpy as np
import pytest

from vera_jax.adapters.files import stack_layers, unstack_layers
from vera_jax.errors import UserError


def numbered(layers, width=3, kind=np.float32, role="query.vera_d"):
  return {f"encoder.layer.{i}.{role}": np.full(width, i, kind) for i in layers}


HEAD = {"classifier.bias": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
  "tensors, names",
  [
    (numbered(range(12)), ["encoder.layer.0-11.query.vera_d"]),
    (
      numbered([5, 0, 2, 1, 10]),
      [f"encoder.layer.{x}.query.vera_d" for x in ("0-2", "5-5", "10-10")],
    ),
    (
      numbered([0, 1]) | numbered([2], width=4),
      [f"encoder.layer.{x}.query.vera_d" for x in ("0-1", "2-2")],
    ),
    (
      numbered([0, 1]) | numbered([2], kind=np.float64),
      [f"encoder.layer.{x}.query.vera_d" for x in ("0-1", "2-2")],
    ),
    (
      numbered([0, 1]) | numbered([0, 1], role="output.2.vera_d"),
      [f"encoder.layer.0-1.{x}.vera_d" for x in ("query", "output.2")],
    ),
    ({}, []),
  ],
)
def test_there_and_back(tensors, names):
  stacked = stack_layers(HEAD | tensors)
  assert list(stacked) == ["classifier.bias", *names]
  back = unstack_layers(stacked)
  assert back.keys() == (HEAD | tensors).keys()
  for name, value in (HEAD | tensors).items():
    np.testing.assert_array_equal(back[name], value)
    assert back[name].dtype == value.dtype


def test_a_tensor_a_layer_stays_as_it_is():
  assert unstack_layers(numbered([0, 3])).keys() == numbered([0, 3]).keys()


@pytest.mark.parametrize(
  "run, shape", [("0-2", (2, 3)), ("3-1", (1, 3)), ("0-1", ())]
)
def test_other_layers_than_the_name_says(run, shape):
  wrong = {f"encoder.layer.{run}.query.vera_d": np.zeros(shape)}
  with pytest.raises(UserError, match="vera_d has shape .* its name says"):
    unstack_layers(wrong)
