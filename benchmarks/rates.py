"""Which learning rate a sweep over rates gives each method, by one rule.

  python -m benchmarks.rates DIR

The best one has the highest mean over the seeds. It is taken if the mean is
lower at the next rate on both sides; otherwise the next doubling, or halving,
has to be run first.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.report.frame import Sweep, load_sweep


class Choice(NamedTuple):
  """What is known of a method's rates.

  Attributes:
    method: its name, and what else tells its runs from others'.
    means: the mean score of each rate, in percent.
    best: the rate with the highest mean, the lower one of two.
    missing: the rate that has to be run before this is the choice; None if it
      is.
  """

  method: str
  means: dict[float, float]
  best: float
  missing: float | None


def choice_of(method: str, means: Mapping[float, float]) -> Choice:
  """The rule, on the mean score of each rate."""
  rates = sorted(means)
  best = max(rates, key=lambda rate: (means[rate], -rate))
  position = rates.index(best)
  missing = None
  if position == len(rates) - 1:
    missing = 2 * best
  elif position == 0:
    missing = best / 2
  return Choice(method, {rate: means[rate] for rate in rates}, best, missing)


def choices(sweep: Sweep) -> Iterator[Choice]:
  """One for each method, and setting of it, in the order of the runs."""
  runs = sweep.runs.assign(
    rank=[
      "" if pd.isna(rank) else f", rank {rank:g}" for rank in sweep.runs["rank"]
    ],
    init=[
      run["config"].get("vera", {}).get("init", "")
      for run in sweep.runs["result"]
    ],
  )
  if runs["rate"].isna().any():
    raise UserError("Results without learning rates: no sweep of rates.")
  parts = ["method", "rank", "init"]
  for (method, rank, init), group in runs.groupby(parts, sort=False):
    means = group.groupby("rate")["score"].mean().to_dict()
    name = method + rank
    yield choice_of(name + f", {init}" * (runs["init"].nunique() > 1), means)


def main(words: list[str]) -> None:
  if len(words) != 1:
    raise UserError("Name the sweep's folder.")
  for choice in choices(load_sweep(Path(words[0]))):
    means = ", ".join(f"{r:g}: {x:.1f}" for r, x in choice.means.items())
    verdict = f"run {choice.missing:g} as well" if choice.missing else "chosen"
    print(f"{choice.method}: {choice.best:g}, {verdict} ({means})")


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
