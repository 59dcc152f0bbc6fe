"""How far the trained numbers are to go: the rule of docs/rates.md.

Each function takes a method's settings and the inputs of every adapted layer,
and returns s, the distance that each trained number goes in a run. The rate is
what goes so far in so many random steps (`train/optim.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

from vera_jax.errors import UserError

# C, from six tuned rates: by how much a run is to change what a layer gives.
CHANGE = 0.6
HIGHEST = 0.3  # d_init: tried at 0.01, at 0.1, and at 1, where it failed
# Draws of A and B whose entries have Kaiming's variance.
KAIMING = (
  *("kaiming_uniform", "kaiming_normal", "orthogonal", "rademacher"),
  *("sparse_third", "sparse_root", "peft"),
)


def vera_distance(s: Any, inputs: Sequence[int]) -> float:
  """How far d and b are to go, from where d starts.

  Raises:
    UserError: the rule was not derived for such settings, or does not hold.
  """
  if s.init not in KAIMING or s.train != "both":
    raise UserError(
      "the rule is for A and B of Kaiming's variance, where both d and b are"
      f" trained, and vera.init is {s.init}, vera.train {s.train}"
    )
  if abs(s.d_init) > HIGHEST:
    raise UserError(
      f"vera.d_init is {s.d_init:g}, and where d starts at 1 the rule's rates"
      " were up to four times too low (docs/rates.md)"
    )
  # I is the widest of the layers that share A
  widest = max(inputs) if s.sharing == "shared" else None
  return distance(s.d_init, [i / (widest or i) for i in inputs])


def distance(d_init: float, shares: Sequence[float]) -> float:
  """s of C^2 = 4 s^2 (d_init^2 + s^2) (sum of i / I), whose i / I are given."""
  change = CHANGE**2 / sum(shares)
  return math.sqrt((math.sqrt(d_init**4 + change) - d_init**2) / 2)


def lora_distance(s: Any, inputs: Sequence[int]) -> float:
  """C^2 = alpha^2 s^2 (sum of 1 / 3 + i s^2).

  Raises:
    UserError: alpha is 0, so that nothing would change.
  """
  if not s.alpha:
    raise UserError("lora.alpha is 0")
  # divided by the root of the rank, alpha counts as so much more
  alpha = s.alpha * (math.sqrt(s.rank) if s.scaling == "root" else 1)
  start = len(inputs) / 3
  root = math.sqrt(start**2 + 4 * sum(inputs) * (CHANGE / alpha) ** 2)
  return math.sqrt((root - start) / (2 * sum(inputs)))
