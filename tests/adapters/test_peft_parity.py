"""PEFT's own matrices, live; tests/peft_io compares whole models with PEFT."""

import numpy as np
import pytest

from vera_jax.adapters.interface import Target
from vera_jax.adapters.projections import make_pair
from vera_jax.adapters.randlora import randlora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # PEFT's own, at import and construction
@pytest.mark.parametrize("key", [0, 1, 3, 2**31, 2**32 - 1])
def test_pefts_matrices_bit_for_bit(key):
  layers = torch.nn.Linear(40, 20), torch.nn.Linear(20, 56)
  names = ["0", "1"]  # as wide as the widest layer: 40 in, 56 out
  config = peft.VeraConfig(r=16, projection_prng_key=key, target_modules=names)
  theirs = peft.get_peft_model(torch.nn.Sequential(*layers), config).base_model
  pair = make_pair(16, 40, 56, seed=key, init="peft")
  np.testing.assert_array_equal(pair["A"], theirs.vera_A["default"].numpy())
  np.testing.assert_array_equal(pair["B"], theirs.vera_B["default"].numpy())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key, rank", [(0, 6), (2**32 - 1, 7)])
def test_pefts_bases_of_randlora_bit_for_bit(key, rank):
  """Drawn in bfloat16 and divided by their standard deviations."""
  layers = torch.nn.Linear(40, 20), torch.nn.Linear(20, 56)
  config = peft.RandLoraConfig(
    r=rank, projection_prng_key=key, target_modules=["0", "1"]
  )
  theirs = peft.get_peft_model(torch.nn.Sequential(*layers), config).base_model
  made = randlora(rank, init="peft", projection_seed=key).shared(
    {("0",): Target(40, 20), ("1",): Target(20, 56)}
  )
  for name, matrix in made.items():
    want = getattr(theirs, f"randlora_{name}")["default"].numpy()
    np.testing.assert_array_equal(matrix, want.reshape(matrix.shape))
