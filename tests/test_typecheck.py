"""The shapes that annotations name are checked in all other tests."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from vera_jax.operations.attention import rotate


def test_an_array_of_another_shape_is_refused():
  x, turns = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 1, 2))
  assert rotate(x, turns, turns).shape == x.shape
  with pytest.raises(TypeCheckError, match="cos"):
    rotate(x, turns[:, :2], turns)
