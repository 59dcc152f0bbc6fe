"""What the failures of Table 6 look like, from a result alone."""

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

  Collapsed: the same answer to everything, in the best or the last epoch.
  d gone to zero: in most of VeRA's layers, so that nothing is left of the
  delta. Unstable: the training loss of an epoch is not finite, or well above
  an earlier one's.

  Args:
    result: the contents of a result.json.
  """
  signs = []
  if any(result[epoch].get("collapsed") for epoch in ("best", "last")):
    signs.append(COLLAPSED)
  norms = result.get("norms") or []
  sizes = [vector["rms"] for vector in norms if vector["leaf"] == "d"]
  if sizes and np.median(sizes) < ZERO:
    signs.append(NO_D)
  losses = np.array([e.get("train_loss", 0.0) for e in result["history"]])
  lowest = np.minimum.accumulate(losses)
  # A comparison with NaN is false, so that a loss of NaN counts as unstable.
  if not (np.isfinite(losses).all() and (losses <= RISE * lowest).all()):
    signs.append(UNSTABLE)
  return signs
