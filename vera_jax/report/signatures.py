"""What the failures of Table 6 look like, told from a result alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

COLLAPSED, NO_D, UNSTABLE = "collapsed", "d gone to zero", "unstable loss"
# The root mean square of d starts at d_init, 0.1; a rate of 1e-2 moves it by
# about as much in a hundred steps. Below this, and in most layers, d is off.
ZERO = 1e-3
RISE = 1.2  # of an epoch's loss over the best epoch's before it


def signatures(result: Mapping[str, Any]) -> list[str]:
  """The failures that a run shows, of `COLLAPSED`, `NO_D` and `UNSTABLE`.

  Args:
    result: the contents of a result.json.
  """
  found = {
    COLLAPSED: is_collapsed(result),
    NO_D: d_is_zero(result),
    UNSTABLE: is_unstable(result),
  }
  return [name for name, there in found.items() if there]


def is_collapsed(result: Mapping[str, Any]) -> bool:
  """One and the same answer to everything, in the best or the last epoch."""
  return any(result[e].get("collapsed", False) for e in ("best", "last"))


def d_is_zero(result: Mapping[str, Any]) -> bool:
  """VeRA's d, in most of the layers: then nothing of the delta is left."""
  norms = result.get("norms") or []
  sizes = [vector["rms"] for vector in norms if vector["leaf"] == "d"]
  return bool(sizes) and float(np.median(sizes)) < ZERO


def is_unstable(result: Mapping[str, Any]) -> bool:
  """The training loss of an epoch rose well above an earlier one's."""
  losses = [epoch.get("train_loss", 0.0) for epoch in result["history"]]
  if not all(np.isfinite(losses)):
    return True
  lowest = np.minimum.accumulate(losses)
  risen = np.array(losses[1:]) > RISE * lowest[:-1]
  return bool(risen.any())
