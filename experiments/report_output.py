"""What a report prints and writes: tables, verdicts, figures."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd

from configs import open_choices, paper
from experiments import cli
from vera_jax.errors import UserError, install
from vera_jax.files import write_text
from vera_jax.places import local_copy
from vera_jax.report import tables, verdict
from vera_jax.report.frame import Sweep
from vera_jax.report.outputs import side_by_side
from vera_jax.report.summary import summary
from vera_jax.report.text_scores import text_notes, text_scores, text_tables
from vera_jax.terminal import LINES, Console, printable


def against_paper(sweep: Sweep, files: Sequence[str]) -> pd.DataFrame:
  """The verdicts on a sweep's runs; `files` have FastChat's judgments.

  Raises:
    UserError: there are none, or a file can't be read.
  """
  judgments: dict[tuple[str, str], list[float]] = {}
  for file in files:
    judgments |= verdict.read_judgments(
      local_copy(file), open_choices.TURN.value
    )
  table = verdict.verdicts(
    sweep,
    paper.planned,
    epochs=open_choices.EPOCH.value,
    judgments=judgments,
  )
  if table.empty:
    raise UserError(
      "No table or figure of the paper has a run with the settings of these;"
      " docs/reproduce.md has the command for each."
    )
  return table


def show_verdicts(table: pd.DataFrame, kind: str) -> None:
  """Prints verdicts in a format that `--format` names."""
  console = Console()
  if kind in ("csv", "json"):
    sys.stdout.write(unrounded(table, kind))
  elif kind == "latex":
    text = tables.latex(tables.against_paper(table), "Against the paper")
    sys.stdout.write(printable(f"{text}\n", keep=LINES))
  elif kind == "markdown" or (kind == "auto" and not console.is_terminal):
    sys.stdout.write(printable(tables.paper_page(table) + "\n", keep=LINES))
  else:
    cells = tables.against_paper(table)
    title = "Against the paper"
    console.print(tables.for_terminal(cells, title, width=console.width))
    for note in tables.paper_notes(table):
      console.print(note)


def unrounded(table: pd.DataFrame, kind: str) -> str:
  """A table's rows as CSV, or as a list of JSON objects."""
  text = table.to_csv(index=False)
  if kind == "json":
    text = table.to_json(orient="records", force_ascii=False) + "\n"
  return printable(text, keep=LINES)


def show(sweep: Sweep, kind: str) -> None:
  """Prints the table in a format that `--format` names."""
  console = Console()
  table = summary(sweep)
  if kind in ("csv", "json"):
    for remark in sweep.remarks:
      cli.complain(remark)
    sys.stdout.write(unrounded(table, kind))
  elif kind == "latex":
    sys.stdout.write(printable(tables.latex_page(sweep, table), keep=LINES))
  elif kind == "markdown" or (kind == "auto" and not console.is_terminal):
    sys.stdout.write(printable(tables.page(sweep, table), keep=LINES))
  else:
    cells = tables.columns(table, sweep.paper)
    shown = tables.for_terminal(cells, sweep.title, width=console.width)
    console.print(shown)
    for note in tables.notes(sweep, table):
      console.print(note)
    if texts := text_scores(sweep):
      for title, some in text_tables(texts).items():
        console.print(tables.for_terminal(some, title, width=console.width))
      for note in text_notes(texts):
        console.print(note)


def write(
  sweep: Sweep,
  folder: Path,
  *,
  judged: pd.DataFrame | None = None,
  width: float | None = None,
) -> None:
  """Writes all files of a report, the figures last.

  Args:
    sweep: the results.
    folder: where to.
    judged: the verdicts of `against_paper`, where it was asked for.
    width: of the figures in a paper, in inches.

  Raises:
    UserError: what draws the figures isn't installed.
  """
  table = summary(sweep)
  runs = sweep.runs.drop(columns=["result", "folder", "data"])
  runs["signatures"] = runs["signatures"].map("; ".join)
  files = {
    "table.md": f"# {sweep.title}\n\n{tables.page(sweep, table)}",
    "table.tex": tables.latex_page(sweep, table),
    "table.csv": table.to_csv(index=False),
    "runs.csv": runs.to_csv(index=False),
  }
  if texts := text_scores(sweep):
    files["texts.csv"] = summary(texts).to_csv(index=False)
  if outputs := side_by_side(sweep):
    files["outputs.md"] = f"# {sweep.title}: outputs\n\n{outputs}"
  if judged is not None:
    page = tables.paper_page(judged)
    text = f"# {sweep.title}, against the paper\n\n{page}\n"
    files["against_paper.md"] = text
    files["against_paper.csv"] = judged.to_csv(index=False)
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    write_text(folder / name, text)
  plots, _ = drawing(f"{folder} has the tables. ")
  for name, figure in plots.figures(sweep, table, width=width):
    plots.save(figure, folder, name)


def drawing(before: str = "") -> tuple[ModuleType, ModuleType]:
  """`plots` and `style`, which the plain install doesn't have the needs of.

  Raises:
    UserError: something of that isn't installed; `before` stands before it.
  """
  try:
    from vera_jax.report import plots, style
  except ImportError as error:
    raise UserError(
      f"{before}The figures need {error.name}: {install('report')}"
    ) from error
  return plots, style
