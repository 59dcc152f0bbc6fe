"""Some of the models and methods that `benchmarks.others` examines, all of it
on the smallest of them; docs/architectures.md has the whole table."""

import pytest

from benchmarks import others
from tests.adapters.others.models import MODELS

pytestmark = pytest.mark.slow
PAIRS = [
  ("layers with a function of the model's", "lora"),
  ("layers with a say in their training", "vera"),
  ("a model that intercepts its layers", "vera"),
  ("flax's WeightNorm", "lora"),
  ("flax's map_variables", "ia3 on inputs"),
  ("an autoencoder with tied weights", "dora"),
  ("a stack on the second axis", "lora"),
  ("a stack, unrolled", "lora"),
]


@pytest.mark.parametrize("name, method", PAIRS)
def test_adapted_merged_and_the_definition_agree(name, method):
  found = others.examine(MODELS[name], [method], plans={})
  assert others.faults(found) == []
  assert found["methods"][method]["layers"] > 0


def test_gradients_by_every_plan():
  """Of convolutions that standardise their kernels, which are only folded."""
  model = MODELS["octo's small stem, with FiLM"]
  found = others.examine(model, ["vera"])
  assert others.faults(found) == []
  slopes = found["methods"]["vera"]["gradients"]
  assert "StdConv" in slopes.pop("factored")
  assert all(isinstance(value, float) for value in slopes.values())


def test_a_fault_is_found(monkeypatch):
  """Where merging forgets the adapter, and where a refusal says nothing."""
  monkeypatch.setattr(
    others, "merge", lambda params, *args, adapter, **kwargs: strip(params)
  )
  found = others.examine(MODELS["an ensemble"], ["ia3"], plans={})
  (fault,) = others.faults(found)
  assert fault.startswith("ia3: merged 0.")
  found["refused"] = {
    "critics/kernel": f"{others.UNNAMED}: it counts as adapted"
  }
  assert len(others.faults(found)) == 2


def strip(tree):
  """The parameters without IA3's."""
  return {
    name: strip(below) if isinstance(below, dict) else below
    for name, below in tree.items()
    if not name.startswith("ia3")
  }


def test_every_origin_is_there():
  origins = " ".join(other.origin for other in MODELS.values())
  for name in (
    *("octo", "vision_transformer", "big_vision", "scenic", "flax", "t5x"),
    *("FlaxDiff", "gemma"),
  ):
    assert name in origins
  assert len(MODELS) == 27
