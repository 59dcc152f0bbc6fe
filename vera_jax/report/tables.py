"""The summary for a reader: text in columns; Markdown, CSV or a rich table."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from vera_jax.report.frame import Sweep
from vera_jax.report.signatures import COLLAPSED
from vera_jax.report.summary import convergence, smallest_ranks

LEFT = ("task", "metric", "method", "condition", "seen", "paper's")
Row = Any  # of the summary, a pandas Series


def columns(table: pd.DataFrame, paper: str = "") -> dict[str, list[str]]:
  """Column by column; those that would be empty are left out.

  `paper` is the model of the paper's numbers where it is not the trained one.
  """
  makers: dict[str, Callable[[Row], str]] = {
    "task": lambda row: row["task"],
    "metric": lambda row: row["metric"],
    "method": lambda row: row["method"],
    "condition": lambda row: row["condition"].replace("|", "\\|"),
    "adapter": lambda row: f"{row['adapter']:,}",
    "head": lambda row: f"{row['head']:,}",
    "best epoch": lambda row: _spread(row, "score", "low", "high"),
    "last epoch": lambda row: _spread(row, "last", "last_low", "last_high"),
    f"paper, {paper}" if paper else "paper": _paper,
    "less LoRA (95 %)": _difference,
    "p (Holm)": lambda row: _p(row["p_holm"]),
    "seen": _seen,
    "seeds": lambda row: str(row["seeds"]),
    "epochs": lambda row: str(row["epochs"]),
    "seconds a run": lambda row: f"{row['seconds']:.0f}",
  }
  made = {
    name: [make(row) for _, row in table.iterrows()]
    for name, make in makers.items()
  }
  return {name: cells for name, cells in made.items() if any(cells)}


def _spread(row: Row, middle: str, low: str, high: str) -> str:
  """Median, with the lowest and highest seed; collapsed ones are marked."""
  text = f"{row[middle]:.1f}"
  if row["seeds"] > 1:
    text += f" ({row[low]:.1f} to {row[high]:.1f})"
  return text


def _paper(row: Row) -> str:
  if row["paper"] is None or math.isnan(row["paper"]):
    return ""
  return f"{row['paper']:.1f} ± {row['paper_spread']:.1f}"


def _difference(row: Row) -> str:
  if math.isnan(row["difference"]):
    return ""
  text = f"{row['difference']:+.1f}"
  if not math.isnan(row["ci_low"]):
    text += f" ({row['ci_low']:+.1f} to {row['ci_high']:+.1f})"
  return text


def _p(value: float) -> str:
  if math.isnan(value):
    return ""
  return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seen(row: Row) -> str:
  """Failure signatures, with the number of runs where it is not all."""
  return ", ".join(
    f"{name}" if count == row["seeds"] else f"{name} {count} of {row['seeds']}"
    for name, count in row["signatures"].items()
  )


def markdown(cells: dict[str, list[str]]) -> str:
  rule = ["---" if name in LEFT else "---:" for name in cells]
  rows = zip(*cells.values(), strict=True)
  lines = [list(cells), rule, *map(list, rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# What a narrow terminal does without, the first first.
SPARED = (
  "seconds a run",
  "epochs",
  "metric",
  "last epoch",
  "head",
  "seeds",
  "p (Holm)",
  "adapter",
)


def for_terminal(
  cells: dict[str, list[str]], title: str, *, width: int
) -> Table:
  """As a rich table; columns that don't fit are left out and named."""
  cells, spared = dict(cells), []
  for name in SPARED:
    if name in cells and _width(cells) > width:
      del cells[name]
      spared.append(name)
  table = Table(title=title, title_justify="left")
  if spared:
    table.caption = f"no room for: {', '.join(spared)}"
    table.caption_justify = "left"
  for name in cells:
    table.add_column(name, justify="left" if name in LEFT else "right")
  seen = cells.get("seen", [])
  for place, row in enumerate(zip(*cells.values(), strict=True)):
    bad = place < len(seen) and COLLAPSED in seen[place]
    table.add_row(*row, style="red" if bad else None)
  return table


def _width(cells: dict[str, list[str]]) -> int:
  """Of the table, each cell in one line."""
  columns = [max(map(len, (n, *column))) for n, column in cells.items()]
  return 1 + sum(3 + width for width in columns)


def csv(table: pd.DataFrame) -> str:
  """All of the summary's columns, unrounded."""
  return table.to_csv(index=False)


def runs_csv(runs: pd.DataFrame) -> str:
  """A row a run, without what a cell can't hold."""
  plain = runs.drop(columns=["result", "folder"])
  joined = plain["signatures"].map("; ".join)
  return plain.assign(signatures=joined).to_csv(index=False)


def notes(sweep: Sweep, table: pd.DataFrame) -> list[str]:
  """What stands below the table, a sentence each."""
  return [
    *_reference(table),
    *_ranks(table),
    *_convergence(sweep.runs),
    *(
      f"{f['run']} failed: {f['failed'].splitlines()[0]}" for f in sweep.failed
    ),
  ]


def _reference(table: pd.DataFrame) -> list[str]:
  with_p = table[table["pairs"] > 0]
  if with_p.empty:
    return []
  several = table[table["method"] == "lora"].groupby("task").size().max() > 1
  whose = " of the best median" if several else ""
  return [
    f"Less LoRA: mean difference from the LoRA condition{whose} over the seeds"
    " that both have, with Student's 95 % interval; p of the paired t-test,"
    " adjusted by Holm for the number of comparisons in this table."
  ]


def _ranks(table: pd.DataFrame) -> list[str]:
  return [
    f"{row['task']}, {row['method']}: best at rank {row['best']}"
    f" ({row['best_score']:.1f}); the smallest rank within its spread is"
    f" {row['smallest']} ({row['smallest_score']:.1f},"
    f" {row['smallest_adapter']:,} parameters)."
    for _, row in smallest_ranks(table).iterrows()
  ]


def _convergence(runs: pd.DataFrame) -> list[str]:
  notes = []
  for _, row in convergence(runs).iterrows():
    text = (
      f"{row['task']}, {row['method']}: the training loss comes lowest with"
      f" {row['condition']}, to {row['loss']:.4f} ({row['adapter']:,}"
      " parameters)"
    )
    if row["method"] != "lora":
      never = row["reaches"] is None or math.isnan(row["reaches"])
      text += (
        "; it doesn't reach LoRA's last loss"
        if never
        else f"; it reaches LoRA's last loss in epoch {row['reaches']:.0f}"
      )
    notes.append(f"{text}.")
  return notes


def text_of(cells: dict[str, list[str]], below: Sequence[str]) -> str:
  """The Markdown page."""
  lines = [markdown(cells)]
  if below:
    lines += ["", *(f"- {note}" for note in below)]
  return "\n".join(lines) + "\n"
