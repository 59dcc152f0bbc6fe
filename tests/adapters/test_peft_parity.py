"""PEFT's own matrices, live; tests/peft_io compares whole models with PEFT."""

import numpy as np
import pytest

from vera_jax.adapters.projections import make_pair

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
