"""What a run ends with on standard output: its numbers, speed and folder."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Column, Table

from experiments.cli import complain
from vera_jax.places import place
from vera_jax.terminal import Console, printable

MOST = 8  # classes whose answers have room in a table
LEAST = 9  # letters of a name that a column has room for
SCORES = ("rows", "precision", "recall", "F1")  # of a class


def show_result(result: Mapping[str, Any], workdir: Path | str) -> None:
  """The result's main numbers as a table on standard output."""
  table = Table(
    "",
    *(Column(f"{which} epoch", justify="right") for which in ("best", "last")),
    title=f"{result['task']}, {result['method']}",
    min_width=48,
  )
  best, last = result["best"], result["last"]
  table.add_row("epoch", str(best["epoch"]), str(last["epoch"]))
  for name, value in best["metrics"].items():
    table.add_row(name, f"{value:.4f}", f"{last['metrics'][name]:.4f}")
  test = result.get("test")
  if test is not None:
    table.add_section()
    for name, value in test["scores"].items():
      table.add_row(f"test {name}", "", f"{value:.4f}")
  table.add_section()
  parameters = result["parameters"]
  table.add_row("adapter parameters", f"{parameters['adapter']:,}", "")
  table.add_row("head parameters", f"{parameters['head']:,}", "")
  table.add_row("seconds", f"{result['seconds']:.0f}", "")
  Console().print(table)
  if counts := best.get("confusion"):
    show_classes(result["labels"], counts)
  show_speed(result)
  if test is not None and test["missing"]:
    Console().print(test["missing"])
  Console().print(f"{workdir}")


def show_classes(
  labels: Sequence[str], counts: Sequence[Sequence[int]]
) -> None:
  """Each class's scores in the best epoch, and the answers that it got.

  A narrow terminal has no room for the answers, and then for no borders.
  """
  from vera_jax.tasks.metrics import class_scores

  names = [printable(label) for label in labels]
  taken_for = names if len(names) <= MOST else []  # that have room beside it
  headings = ["class", *SCORES, *(f"as\n{name}" for name in taken_for)]
  lines = []
  for name, scores, row in zip(
    names, class_scores(counts), counts, strict=True
  ):
    rows, *shares = scores
    answers = (f"{n:,}" for n in row[: len(taken_for)])
    lines.append([name, f"{rows:,}", *(f"{x:.4f}" for x in shares), *answers])
  console = Console()
  # names may be folded, and numbers may not
  widths = [
    max(min(LEAST, max(map(len, heading.split("\n")))), *map(len, numbers))
    for heading, *numbers in zip(
      headings, *([""] + line[1:] for line in lines), strict=True
    )
  ]

  def fits(columns: int) -> bool:
    return sum(widths[:columns]) + 3 * columns < console.width

  title, shown = "classes in the best epoch", 1 + len(SCORES)
  table = Table()
  if not fits(shown):
    table.box, table.padding = None, (0, 1, 0, 0)
  elif taken_for and fits(len(widths)):
    title, shown = f"{title}, and what they were taken for", len(widths)
  table.title = title
  for i, heading in enumerate(headings[:shown]):
    table.add_column(
      heading,
      justify="right" if i else "left",
      overflow="fold",
      min_width=widths[i],
    )
  for line in lines:
    table.add_row(*line[:shown])
  console.print(table)


def show_speed(result: Mapping[str, Any], who: str = "") -> None:
  """A line; none for results of before it was measured."""
  if speed := result.get("speed"):
    from vera_jax.train.clock import sentence

    Console().print(who + sentence(speed), soft_wrap=True)


def show_trace(config: ConfigDict, workdirs: Iterable[Path | str]) -> None:
  """Where the trace is that --profile asked for, or that there is none."""
  steps = config.log.get("profile")
  folders = [place(workdir) / "profile" for workdir in workdirs]
  if steps and (traced := [folder for folder in folders if folder.exists()]):
    Console().print(f"trace: {traced[0]}")
  elif steps:
    complain(f"No trace: steps {steps} had been trained before.")


def show_seeds(
  results: Sequence[Mapping[str, Any]], workdirs: Sequence[Path | str]
) -> None:
  """Runs that differ in their seeds: one row each, and the median.

  Scores in percent.
  """
  done = [result for result in results if "failed" not in result]
  names = ("best epoch", "its score", "last score")
  table = Table(
    "seed",
    *(Column(name, justify="right") for name in names),
    title="{task}, {method}, {score_name}".format(**done[0]) if done else None,
    min_width=48,
  )
  for result in results:
    seed = str(result["seed"])
    if "failed" in result:
      table.add_row(seed, f"failed at step {result['step']}", "", "")
      continue
    best, last = result["best"], result["last"]
    scores = (f"{100 * epoch['score']:.1f}" for epoch in (best, last))
    table.add_row(seed, str(best["epoch"]), *scores)
  if done:
    shown = []
    for which in ("best", "last"):
      values = sorted(100 * result[which]["score"] for result in done)
      shown.append(f"{statistics.median(values):.1f}")
      if len(values) > 1:
        shown[-1] += f" ({values[0]:.1f} to {values[-1]:.1f})"
    table.add_section()
    table.add_row("median", "", *shown)
  Console().print(table)
  if done:
    show_speed(done[0], "each run: ")
  for result in results:
    if missing := result.get("test", {}).get("missing"):
      line = f"seed {result['seed']}: {missing}"
      Console().print(line)
  for workdir in workdirs:
    Console().print(f"{workdir}")
