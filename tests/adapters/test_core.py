"""The core of the adapters stands without its extensions."""

import subprocess
import sys

import pytest

# A process without `adapters/kinds`: dense layers are adapted, others refused.
ALONE = """
import sys, types

sys.modules["vera_jax.adapters.kinds"] = types.ModuleType("kinds")
import flax.linen as nn, jax, jax.numpy as jnp
import vera_jax


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.DenseGeneral((2, 3), name="heads")(nn.Dense(4, name="dense")(x))
    return nn.Conv(3, (1,), name="conv")(x)


model, x = Net(), jnp.ones((2, 5))
base = model.init(jax.random.key(0), x)
method = vera_jax.vera(rank=3)
adapted = vera_jax.adapt(model, method, targets=["dense", "heads"])
variables = adapted.init_on(base, jax.random.key(1), x)
assert (adapted.apply(variables, x) == model.apply(base, x)).all()
try:
  vera_jax.find_targets(model, ["conv"], x)
except vera_jax.UserError as error:
  print(error)
"""


@pytest.mark.slow
def test_without_other_kinds_of_layers():
  done = subprocess.run(
    [sys.executable, "-c", ALONE], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "conv: its kernel is read without a call of a known layer" in (
    done.stdout
  )
