"""A table from the result.json files below a folder.

  python -m experiments.report results/minilm

Markdown on standard output: a row for each task and method, over the seeds that
were run. Scores are in percent: the best epoch of each seed as the paper takes
it (median, with the lowest and the highest seed), and the last epoch's.
"""

import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.results import read_all

HEADER = (
  "task",
  "metric",
  "method",
  "adapter",
  "head",
  "best epoch",
  "last epoch",
  "seeds",
  "epochs",
  "seconds a run",
)
METHODS = ("vera", "lora", "bitfit", "head", "full")


def main(folders: list[str]) -> None:
  print(table(folders or ["results"]))


def table(folders: list[str]) -> str:
  """The Markdown table of all results below some folders."""
  results = [r for name in folders for r in read_all(Path(name))]
  if not results:
    raise UserError(f"There is no result.json below {', '.join(folders)}.")
  return markdown(results)


def _row(runs: list[dict[str, Any]]) -> tuple[str, ...]:
  first = runs[0]
  epochs = {run["config"]["optim"]["epochs"] for run in runs}
  seconds = statistics.median(run["seconds"] for run in runs)
  return (
    first["task"],
    first["score_name"],
    first["method"],
    f"{first['parameters']['adapter']:,}",
    f"{first['parameters']['head']:,}",
    cli.spread(run["best"]["score"] for run in runs),
    cli.spread(run["last"]["score"] for run in runs),
    str(len(runs)),
    ", ".join(map(str, sorted(epochs))),
    f"{seconds:.0f}",
  )


def markdown(results: Iterable[dict[str, Any]]) -> str:
  """The table; rows by task, then by method."""

  def key(result: dict[str, Any]) -> tuple[str, int]:
    return result["task"], METHODS.index(result["method"])

  ordered = sorted(results, key=key)
  rows = [_row(list(runs)) for _, runs in groupby(ordered, key)]
  rule = ["---"] * 3 + ["---:"] * (len(HEADER) - 3)
  lines = [HEADER, tuple(rule), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
