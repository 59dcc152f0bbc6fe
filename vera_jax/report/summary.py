"""A row a condition: median and spread over seeds, beside paper and LoRA."""

from collections import Counter
from typing import Any

import pandas as pd

from vera_jax.report.frame import METHODS, Sweep, history
from vera_jax.report.published import published
from vera_jax.report.significance import Difference, holm, paired

BY = ["task", "method", "condition"]


def summary(sweep: Sweep) -> pd.DataFrame:
  """All conditions of a sweep; scores in percent.

  Columns: task, metric, method, condition, adapter, head, rank, score (median
  of the seeds' best epochs), low, high, last, last_low, last_high, seeds,
  epochs, seconds (median), paper, paper_spread, paper_source, difference, p and
  the rest of `significance.Difference` against LoRA, p_holm over all
  comparisons of the sweep, collapsed (runs), signatures (count by name).
  """
  groups = sweep.runs.groupby(BY, sort=False)
  rows = [_row(runs, sweep.paper) for _, runs in groups]
  table = pd.DataFrame(rows)
  compared = pd.DataFrame(
    [_against_lora(row, table, sweep.runs) for _, row in table.iterrows()],
    columns=["difference", "ci_low", "ci_high", "p", "pairs", "reference"],
  )
  table = pd.concat([table, compared], axis=1)
  return table.assign(p_holm=holm(table["p"].astype(float).tolist()))


def _row(runs: pd.DataFrame, model: str) -> dict[str, Any]:
  first = runs.iloc[0]
  paper = published(first["result"]["config"], model or None)
  last = runs["last"]
  return {
    **{key: first[key] for key in ("task", "metric", "method", "condition")},
    **{key: first[key] for key in ("adapter", "head", "rank", "epochs")},
    "score": runs["score"].median(),
    "low": runs["score"].min(),
    "high": runs["score"].max(),
    "last": last.median(),
    "last_low": last.min(),
    "last_high": last.max(),
    "seeds": len(runs),
    "seconds": runs["seconds"].median(),
    "paper": paper.score if paper else None,
    "paper_spread": paper.spread if paper else None,
    "paper_source": paper.source if paper else "",
    "collapsed": int(runs["collapsed"].sum()),
    "signatures": dict(
      Counter(s for flags in runs["signatures"] for s in flags)
    ),
  }


def _against_lora(
  row: pd.Series, table: pd.DataFrame, runs: pd.DataFrame
) -> tuple[Any, ...]:
  """The comparison, and the name of the LoRA that it is with."""
  loras = table[(table["task"] == row["task"]) & (table["method"] == "lora")]
  if row["method"] == "lora" or loras.empty:
    return (*[float("nan")] * 4, 0, "")
  best = loras.loc[loras["score"].idxmax()]
  found: Difference = paired(_by_seed(runs, row), _by_seed(runs, best))
  return (*found, f"lora {best['condition']}".strip())


def _by_seed(runs: pd.DataFrame, row: pd.Series) -> dict[int, float]:
  same = (runs[BY] == row[BY]).all(axis=1)
  chosen = runs[same]
  return dict(zip(chosen["seed"], chosen["score"], strict=True))


def smallest_ranks(table: pd.DataFrame) -> pd.DataFrame:
  """The smallest rank whose median lies within the spread of the best rank's.

  A row a task and method that has several ranks: best rank, smallest rank,
  both their scores and parameters.
  """
  rows = []
  for (task, method), group in table.groupby(["task", "method"], sort=False):
    if group["rank"].nunique() < 2:
      continue
    best = group.loc[group["score"].idxmax()]
    near = group[group["score"] >= best["low"]]
    least = near.loc[near["rank"].astype(float).idxmin()]
    rows.append(
      {
        "task": task,
        "method": method,
        "best": int(best["rank"]),
        "best_score": best["score"],
        "smallest": int(least["rank"]),
        "smallest_score": least["score"],
        "best_adapter": best["adapter"],
        "smallest_adapter": least["adapter"],
      }
    )
  return pd.DataFrame(rows)


def convergence(runs: pd.DataFrame) -> pd.DataFrame:
  """How fast each method's best rate brings the training loss down.

  A row a task and method of which several learning rates were run: the
  condition whose last median loss is lowest, that loss, and the first epoch
  whose median loss is at or below the last one of LoRA's best condition; None
  where it never is, or there is no LoRA.
  """
  rows: list[dict[str, Any]] = []
  for (task, method), group in runs.groupby(["task", "method"], sort=False):
    if group["rate"].nunique() < 2:
      continue
    losses = history(group).groupby(["condition", "epoch"])["loss"].median()
    curves = losses.unstack("epoch")
    best = curves.iloc[:, -1].idxmin()
    one = group[group["condition"] == best].iloc[0]
    rows.append(
      {
        "task": task,
        "method": method,
        "condition": best,
        "adapter": one["adapter"],
        "loss": curves.loc[best].iloc[-1],
        "curve": curves.loc[best],
      }
    )
  lora = {row["task"]: row["loss"] for row in rows if row["method"] == "lora"}
  for row in rows:
    below = row["curve"] <= lora.get(row["task"], -1.0)
    row["reaches"] = int(below.idxmax()) if below.any() else None
  return pd.DataFrame(rows)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
  """By task, then by method as `METHODS` has them."""
  place = table["method"].map(METHODS.index)
  ordered = table.assign(_place=place).sort_values(
    ["task", "_place"], kind="stable"
  )
  return ordered.drop(columns="_place").reset_index(drop=True)
