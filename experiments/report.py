"""Tables and figures from the result.json files below a folder.

  python -m experiments.report DIR                  # a sweep's, or any runs'
  python -m experiments.report DIR --format=csv
  python -m experiments.report results/minilm       # the README's table

Prints a table, in a terminal as one, elsewhere as Markdown, and writes into
DIR/report: table.md, table.csv (a row a condition, unrounded), runs.csv (a row
a run) and the figures as PNG and SVG. --out=FOLDER puts them elsewhere, --out=
nowhere.

A row is a task, a method and what else tells its runs from others. Scores are
in percent: each seed's best epoch as the paper takes it (median, with the
lowest and the highest seed), and the last epoch's. Beside them stand the
paper's number, where it has one, the difference from LoRA over the seeds that
both have, with its p, and what the runs show: collapsed to one class, d gone to
zero, unstable loss. No weights are needed.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from experiments import cli
from vera_jax.report import plots, tables
from vera_jax.report.frame import Sweep, frame, load_sweep
from vera_jax.report.summary import in_order, summary

FORMATS = ("auto", "terminal", "markdown", "csv")
FORMAT = flags.DEFINE_enum("format", "auto", FORMATS, "What is printed.")
OUT = flags.DEFINE_string(
  "out", None, "Where files go. Unset: DIR/report; empty: nowhere."
)


def main(folders: list[str]) -> None:
  folders = folders or ["results"]
  sweep = load_sweep(*folders)
  out = OUT.value if OUT.value is not None else f"{folders[0]}/report"
  show(sweep, FORMAT.value)
  if out:
    write(sweep, Path(out))
    print(f"{out}", file=sys.stderr)


def show(sweep: Sweep, kind: str) -> None:
  console = Console()
  if kind == "auto":
    kind = "terminal" if console.is_terminal else "markdown"
  rows = in_order(summary(sweep))
  cells = tables.columns(rows, sweep.paper)
  below = tables.notes(sweep, rows)
  if kind == "csv":
    sys.stdout.write(tables.csv(rows))
  elif kind == "markdown":
    sys.stdout.write(tables.text_of(cells, below))
  else:
    table = tables.for_terminal(cells, sweep.title, width=console.width)
    console.print(table)
    for note in below:
      console.print(note, markup=False, highlight=False)


def write(sweep: Sweep, folder: Path) -> None:
  """All files of a report."""
  table = in_order(summary(sweep))
  cells = tables.columns(table, sweep.paper)
  folder.mkdir(parents=True, exist_ok=True)
  page = tables.text_of(cells, tables.notes(sweep, table))
  texts = {
    "table.md": f"# {sweep.title}\n\n{page}",
    "table.csv": tables.csv(table),
    "runs.csv": tables.runs_csv(sweep.runs),
  }
  for name, text in texts.items():
    (folder / name).write_text(text, encoding="utf-8")
  for name, figure in plots.figures(sweep, table):
    plots.save(figure, folder, name)


def markdown(results: Iterable[dict[str, Any]]) -> str:
  """The table alone; rows by task, then by method."""
  sweep = Sweep("", "", frame(list(results)), [])
  return tables.markdown(tables.columns(in_order(summary(sweep))))


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
