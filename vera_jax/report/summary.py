"""One row per condition: median and spread over the seeds, paper, LoRA."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from vera_jax.report.frame import BASELINE, FORGETTING, Sweep
from vera_jax.report.published import published

BY = ["task", "metric", "method", "condition"]


def shown(
  middle: float,
  low: float,
  high: float,
  digits: str = ".1f",
  *,
  several: bool = True,
) -> str:
  """A number with its range, as tables have it.

  Without a range where there are not several seeds; "" for NaN.
  """
  text = "" if pd.isna(middle) else f"{middle:{digits}}"
  if several and pd.notna(low):
    text += f" ({low:{digits}} to {high:{digits}})"
  return text


def shown_p(p: float) -> str:
  """A p value as tables have it; "" for NaN."""
  if pd.isna(p):
    return ""
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def summary(sweep: Sweep, *, against: str = BASELINE) -> pd.DataFrame:
  """All conditions of a sweep, in the order of its runs; scores in percent.

  Columns: task, metric, method, condition, adapter, head, rank, rate (of the
  adapter, or of the head where it is all that is trained), shots (examples per
  class), score (median of the seeds' best epochs), low, high, last, last_low,
  last_high, seeds, epochs, seconds (median), paper, paper_spread, paper_source,
  what `paired` finds against LoRA, or another method, p_holm over all
  comparisons of the sweep, collapsed (runs), signatures (count by name).
  """
  rows, by_seed, data = [], [], []
  for _, runs in sweep.runs.groupby(BY, sort=False):
    first, score, last = runs.iloc[0], runs["score"], runs["last"]
    paper = published(first["result"]["config"], sweep.paper or None)
    rows.append(
      {
        **first[["task", "metric", "method", "condition"]],
        **first[["adapter", "head", "rank", "rate", "shots", "epochs"]],
        "score": score.median(),
        "low": score.min(),
        "high": score.max(),
        "last": last.median(),
        "last_low": last.min(),
        "last_high": last.max(),
        "seeds": len(runs),
        "seconds": runs["seconds"].median(),
        "paper": paper.score if paper else None,
        "paper_spread": paper.spread if paper else None,
        "paper_source": paper.source if paper else "",
        "collapsed": int(runs["collapsed"].sum()),
        "signatures": dict(Counter(runs["signatures"].explode().dropna())),
      }
    )
    by_seed.append(dict(zip(runs["seed"], score, strict=True)))
    data.append(first["data"])
  table = pd.DataFrame(rows)

  # Each condition against that one of its task, metric, base and data of the
  # method to compare with that has the best median.
  compared: list[dict[str, Any]] = []
  for i, row in enumerate(rows):
    same = np.array([data[i] == other for other in data])
    for name in ("task", "metric"):
      same &= table[name] == row[name]
    others = table[(table["method"] == against) & same]
    if row["method"] == against or others.empty:
      compared.append({**paired({}, {}), "reference": ""})
    else:
      scores = others["score"]
      less = row["metric"] == FORGETTING
      best = scores.idxmin() if less else scores.idxmax()
      name = f"{against} {others.loc[best, 'condition']}".strip()
      difference = paired(by_seed[i], by_seed[best])
      compared.append({**difference, "reference": name})
  table = table.join(pd.DataFrame(compared))
  return table.assign(p_holm=holm(table["p"]))


def paired(
  ours: Mapping[int, float], theirs: Mapping[int, float]
) -> dict[str, float]:
  """Compares scores by seed; seeds that one side lacks are left out.

  Returns:
    difference, the mean of ours minus theirs in the scores' unit; ci_low and
    ci_high, its 95 % confidence interval by Student's t; p, two-sided, of the
    paired t-test; pairs, the number of seeds. NaN stands for what that number
    doesn't allow, and for the p of differences that are all the same.
  """
  seeds = sorted(ours.keys() & theirs.keys())
  apart = np.array([ours[seed] - theirs[seed] for seed in seeds])
  mean = float(apart.mean()) if seeds else np.nan
  low = high = p = np.nan
  # Equal differences leave no noise to test against; scipy would warn.
  if len(seeds) > 1 and np.ptp(apart) <= 1e-9 * max(1.0, abs(mean)):
    low = high = mean
  elif len(seeds) > 1:
    test = stats.ttest_1samp(apart, 0.0)
    low, high = test.confidence_interval(0.95)
    p = test.pvalue
  names = ("difference", "ci_low", "ci_high", "p", "pairs")
  return dict(zip(names, (mean, low, high, p, len(seeds)), strict=True))


def holm(p: pd.Series) -> pd.Series:
  """Adjusts for the number of tests by Holm's step-down; NaN stays NaN."""
  ordered = p.dropna().sort_values()
  factors = np.arange(len(ordered), 0, -1)
  return (ordered * factors).cummax().clip(upper=1.0).reindex(p.index)
