"""Is a method's difference from LoRA more than its seeds' noise?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
  """A paired comparison over the seeds that both have.

  Attributes:
    mean: of ours less theirs, in the scores' unit.
    low, high: the 95 % confidence interval of the mean, by Student's t.
    p: two-sided, of the paired t-test; NaN for fewer than two pairs, or where
      all differences are the same.
    pairs: the number of seeds.
  """

  mean: float
  low: float
  high: float
  p: float
  pairs: int


def paired(
  ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Difference:
  """Compare scores by seed; seeds that one side lacks are left out."""
  seeds = sorted(set(ours) & set(theirs))
  if not seeds:
    return Difference(np.nan, np.nan, np.nan, np.nan, 0)
  apart = np.array([ours[seed] - theirs[seed] for seed in seeds])
  n, mean = len(apart), float(apart.mean())
  if n < 2:
    return Difference(mean, np.nan, np.nan, np.nan, n)
  error = float(apart.std(ddof=1)) / np.sqrt(n)
  half = float(stats.t.ppf(0.975, n - 1)) * error
  p = np.nan
  if error > 1e-9 * max(1.0, abs(mean)):
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
  return Difference(mean, mean - half, mean + half, p, n)


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusted for their number, by Holm's step-down; NaN stays NaN."""
  p = np.asarray(p_values, float)
  adjusted = np.full(p.shape, np.nan)
  order = [int(i) for i in np.argsort(p) if not np.isnan(p[i])]
  highest = 0.0
  for rank, place in enumerate(order):
    highest = max(highest, min(1.0, (len(order) - rank) * p[place]))
    adjusted[place] = highest
  return adjusted.tolist()
