"""Tables and figures from the result.json files below a folder.

  python -m experiments.report DIR                  # a sweep's, or any runs'
  python -m experiments.report DIR --format=csv       # or json
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

from absl import flags

from experiments import cli
from vera_jax.errors import UserError, install
from vera_jax.places import place, staged

FORMATS = ("auto", "terminal", "markdown", "latex", "csv", "json")
HERE = "results", "runs"  # the folders that are meant where none is named
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
  # a checkout has results of ours, and runs are below `runs` by default
  folders = folders or [next((x for x in HERE if Path(x).is_dir()), HERE[0])]
  if JUDGMENTS.value and not AGAINST.value:
    raise UserError("--judgments belongs to --against=paper.")
  # Imported only now: --help and a mistake in the flags need nothing of it.
  try:
    from experiments import report_output
    from vera_jax.report.frame import load_sweep
  except ImportError as error:
    raise UserError(
      f"Reports need {error.name}: {install('report')}"
    ) from error
  width = None
  if WIDTH.value:
    width = report_output.drawing()[1].width_of(WIDTH.value)
  sweep = load_sweep(*folders)
  out = OUT.value if OUT.value is not None else f"{folders[0]}/report"
  judged = None
  if AGAINST.value:
    judged = report_output.against_paper(sweep, JUDGMENTS.value)
    report_output.show_verdicts(judged, FORMAT.value)
  else:
    report_output.show(sweep, FORMAT.value)
  if out:
    try:
      with staged(place(out)) as folder:
        report_output.write(sweep, folder, judged=judged, width=width)
    except OSError as error:
      raise UserError(
        f"--out={out} can't be written: {error.strerror}."
      ) from error
    print(f"{out}", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
