"""Tables and figures from the result.json files below a folder.

  python -m experiments.report DIR                  # a sweep's, or any runs'
  python -m experiments.report DIR --format=csv
  python -m experiments.report DIR --format=latex --width=column   # for a paper
  python -m experiments.report results/minilm
  python -m experiments.report DIR --against=paper  # a verdict for each number

Prints a table, as Markdown where the output is not a terminal, and writes into
DIR/report: table.md, table.tex (LaTeX with booktabs), table.csv (one row per
condition, unrounded), runs.csv (one row per run) and the figures as PNG, SVG
and PDF. --out=FOLDER puts them elsewhere, --out= nowhere. With --width the
figures have the width that they are printed in, and no title. Where runs wrote
texts for test inputs, their scores have tables of their own, unrounded in
texts.csv, and outputs.md shows the texts side by side.

A row is a task, a method and what else distinguishes its runs from others.
Scores are in percent: each seed's best epoch as the paper takes it (median,
with the lowest and the highest seed), and the last epoch's. Beside them stand
the paper's number, where it has one, the difference from LoRA over the seeds
that both have, with its p, and signs of failure: collapsed to one class, d gone
to zero, unstable loss. No weights are needed.

With --against=paper the table has each number of the paper's tables and
figures that the folder has runs for: ours, how far it may be off, and a verdict
(within, above, below, missing, contradicts its own formula), then the settings
that differ from those of docs/reproduce.md. It is written to against_paper.md
and against_paper.csv as well. For scores of a judge, --judgments names the file
that FastChat's gen_judgment writes about the answers of experiments.answer.

A run that several folders hold is counted once, and a file that can't be read
is left out; notes below the table say so.
"""

import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
from absl import flags

from configs import open_choices, paper
from experiments import cli
from vera_jax.errors import UserError, install
from vera_jax.files import write_text
from vera_jax.places import local_copy, place, staged
from vera_jax.report import tables, verdict
from vera_jax.report.frame import Sweep, load_sweep
from vera_jax.report.outputs import side_by_side
from vera_jax.report.summary import summary
from vera_jax.report.text_scores import text_notes, text_scores, text_tables
from vera_jax.terminal import LINES, Console, printable

FORMATS = ("auto", "terminal", "markdown", "latex", "csv")
FORMAT = flags.DEFINE_enum("format", "auto", FORMATS, "What is printed.")
OUT = flags.DEFINE_string(
  "out", None, "Where files go. Unset: DIR/report; empty: nowhere."
)
WIDTH = flags.DEFINE_string(
  "width",
  None,
  "Of the figures of a paper: column, text, or 3.25in, 8.5cm, 240pt. Unset: of"
  " a page's text, with a title.",
)
AGAINST = flags.DEFINE_enum(
  "against", None, ["paper"], "What the runs are compared with, cell by cell."
)
JUDGMENTS = flags.DEFINE_multi_string(
  "judgments", [], "With --against=paper: FastChat's judgments, a .jsonl file."
)


def main(folders: list[str]) -> None:
  folders = folders or ["results"]
  if JUDGMENTS.value and not AGAINST.value:
    raise UserError("--judgments belongs to --against=paper.")
  width = drawing()[1].width_of(WIDTH.value) if WIDTH.value else None
  sweep = load_sweep(*folders)
  out = OUT.value if OUT.value is not None else f"{folders[0]}/report"
  judged = against_paper(sweep) if AGAINST.value else None
  if judged is None:
    show(sweep, FORMAT.value)
  else:
    show_verdicts(judged, FORMAT.value)
  if out:
    try:
      with staged(place(out)) as folder:
        write(sweep, folder, width=width)
        if judged is not None:
          page = tables.paper_page(judged)
          text = f"# {sweep.title}, against the paper\n\n{page}\n"
          write_text(folder / "against_paper.md", text)
          csv = judged.to_csv(index=False)
          write_text(folder / "against_paper.csv", csv)
    except OSError as error:
      raise UserError(
        f"--out={out} can't be written: {error.strerror}."
      ) from error
    print(f"{out}", file=sys.stderr)


def against_paper(sweep: Sweep) -> pd.DataFrame:
  """The verdicts on a sweep's runs."""
  judgments: dict[tuple[str, str], list[float]] = {}
  for file in JUDGMENTS.value:
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
  """Prints verdicts in one of the `FORMATS`."""
  console = Console()
  if kind == "csv":
    sys.stdout.write(printable(table.to_csv(index=False), keep=LINES))
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


def show(sweep: Sweep, kind: str) -> None:
  """Prints the table in one of the `FORMATS`."""
  console = Console()
  table = summary(sweep)
  if kind == "csv":
    for remark in sweep.remarks:
      cli.complain(remark)
    sys.stdout.write(printable(table.to_csv(index=False), keep=LINES))
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


def write(sweep: Sweep, folder: Path, *, width: float | None = None) -> None:
  """Writes all files of a report, the figures last.

  Args:
    sweep: the results.
    folder: where to.
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


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
