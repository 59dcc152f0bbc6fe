"""The summary for a reader: Markdown, LaTeX, or a table in the terminal."""

import re
import textwrap
from collections.abc import Mapping

import pandas as pd
from rich.table import Table

from vera_jax.report.frame import BASELINE, Sweep, history, method_title
from vera_jax.report.signatures import COLLAPSED
from vera_jax.report.summary import shown, shown_p
from vera_jax.report.text_scores import text_notes, text_scores, text_tables
from vera_jax.report.words import metric_title, task_title, words

SIGNS = "signs of failure"
LEFT = (  # the rest are numbers
  *("task", "metric", "method", "condition", SIGNS),
  *("table", "row", "column", "verdict", "note"),
)
# Columns that a narrow terminal leaves out, the first one first.
SPARED = (
  "note",
  "seconds per run",
  "epochs",
  "metric",
  "median at last epoch (range)",
  "head parameters",
  "seeds",
  "p (Holm-adjusted)",
)
NAMES = ("task", "metric", "method", "condition")
NARROW = 14  # letters that a column of names needs
UNPRINTED = (*SPARED[:3], "median at last epoch (range)", "head parameters")
ESCAPED = str.maketrans(
  {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"},
    **{"^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "±": r"$\pm$"},
    **{"−": "$-$", "→": r"$\rightarrow$", "…": r"\dots{}", "×": r"$\times$"},
  }
)


def columns(table: pd.DataFrame, paper: str = "") -> pd.DataFrame:
  """The summary as text under headings; empty columns are left out.

  Args:
    table: a `summary`.
    paper: the model of the paper's numbers where it is not the trained one.
  """
  rows = []
  for row in table.itertuples():
    several = row.seeds > 1
    best = shown(row.score, row.low, row.high, several=several)
    last = shown(row.last, row.last_low, row.last_high, several=several)
    printed = ""
    if pd.notna(row.paper):
      printed = f"{row.paper:.1f} ± {row.paper_spread:.1f}"
    signs = [
      name if count == row.seeds else f"{name} {count} of {row.seeds}"
      for name, count in row.signatures.items()
    ]
    rows.append(
      {
        "task": row.task,
        "metric": row.metric,
        "method": row.method,
        "condition": row.condition.replace("|", "\\|"),
        "adapter parameters": f"{row.adapter:,}",
        "head parameters": f"{row.head:,}",
        "median at best epoch (range)": best,
        "median at last epoch (range)": last,
        f"paper ({paper})" if paper else "paper": printed,
        "difference from LoRA (95 % interval)": shown(
          row.difference, row.ci_low, row.ci_high, "+.1f"
        ),
        "p (Holm-adjusted)": shown_p(row.p_holm),
        SIGNS: ", ".join(signs),
        "seeds": str(row.seeds),
        "epochs": str(row.epochs),
        "seconds per run": f"{row.seconds:.0f}",
      }
    )
  cells = pd.DataFrame(rows)
  return cells.loc[:, (cells != "").any()]


def markdown(cells: pd.DataFrame) -> str:
  rule = ["---" if name in LEFT else "---:" for name in cells]
  lines = [list(cells), rule, *cells.to_numpy()]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(cells: pd.DataFrame, title: str = "") -> str:
  """A table for a paper, which needs \\usepackage{booktabs}.

  What a paper's table doesn't have is left out: seconds, epochs, the last
  epoch, the head's size. Names are as in figures.
  """
  kept = cells.drop(columns=[name for name in UNPRINTED if name in cells])
  inner = {
    "task": task_title,
    "metric": metric_title,
    "method": method_title,
    "condition": lambda name: words(name.replace("\\|", "|")),
  }
  for name, in_words in inner.items():
    if name in kept:
      kept[name] = kept[name].map(in_words)

  def escaped(text: str) -> str:
    text = text.translate(ESCAPED)
    # a minus, where a number begins
    return re.sub(r"(?<![\w.)}])-(?=\d)", "$-$", text)

  lines = [" & ".join(escaped(str(name)) for name in kept) + r" \\"]
  for _, row in kept.iterrows():
    lines.append(" & ".join(map(escaped, row)) + r" \\")
  kinds = "".join("l" if name in LEFT else "r" for name in kept)
  return "\n".join(
    [
      *([f"% {title}"] if title else []),
      rf"\begin{{tabular}}{{@{{}}{kinds}@{{}}}}",
      r"\toprule",
      lines[0],
      r"\midrule",
      *lines[1:],
      r"\bottomrule",
      r"\end{tabular}",
    ]
  )


def latex_page(sweep: Sweep, table: pd.DataFrame) -> str:
  """The tables in LaTeX, with their notes as comments."""
  parts = [latex(columns(table, sweep.paper), sweep.title)]
  remarks = notes(sweep, table)
  if texts := text_scores(sweep):
    parts += [latex(some, title) for title, some in text_tables(texts).items()]
    remarks += text_notes(texts)
  comments = "\n".join(f"% {' '.join(line.split())}" for line in remarks)
  return "\n\n".join([*parts, *([comments] if comments else [])]) + "\n"


def page(sweep: Sweep, table: pd.DataFrame) -> str:
  """The table and its notes in Markdown; `table` is the sweep's summary."""
  parts = [markdown(columns(table, sweep.paper)), _list(notes(sweep, table))]
  if texts := text_scores(sweep):
    for title, cells in text_tables(texts).items():
      parts += [f"**{title}**", markdown(cells)]
    parts.append(_list(text_notes(texts)))
  return "\n\n".join(part for part in parts if part) + "\n"


def against_paper(table: pd.DataFrame) -> pd.DataFrame:
  """Verdicts as text under headings; `table` is from `verdict.verdicts`."""
  rows = []
  for row in table.itertuples():
    # one digit more than the paper has
    digits = f".{len(row.paper.rstrip('KM').partition('.')[2]) + 1}f"
    if row.paper.startswith(">"):
      digits = ".3f"
    paper, ours = row.paper, ""
    if pd.notna(row.paper_spread):
      paper += f" ± {row.paper_spread}"
    if pd.notna(row.ours):
      ours = f"{row.ours:,.0f}" if row.ours > 1000 else f"{row.ours:{digits}}"
    tolerance = f"± {row.tolerance:.2f}" if pd.notna(row.tolerance) else ""
    rows.append(
      {
        "table": row.table,
        "row": row.row,
        "column": row.column,
        "paper": paper,
        "ours": ours,
        "may differ by": tolerance,
        "runs": str(row.runs),
        "verdict": row.verdict,
        "note": row.note,
      }
    )
  return pd.DataFrame(rows)


def paper_page(table: pd.DataFrame) -> str:
  """Verdicts, how many of each, and the settings that differ, in Markdown."""
  return "\n\n".join(
    [markdown(against_paper(table)), _list(paper_notes(table))]
  )


def paper_notes(table: pd.DataFrame) -> list[str]:
  """What stands below the verdicts, one sentence each."""
  counts = table["verdict"].value_counts()
  kinds = ", ".join(f"{n} {name}" for name, n in counts.items())
  lines = [f"{len(table)} cells: {kinds}."]
  differ = table[table["differences"] != ""]
  for settings, some in differ.groupby("differences", sort=False):
    where = [
      f"{table}, {row} ({', '.join(cells['column'])})"
      for (table, row), cells in some.groupby(["table", "row"], sort=False)
    ]
    lines.append(f"Settings that differ, {'; '.join(where)}: {settings}.")
  if differ.empty:
    lines.append("No settings differ from those of the paper's runs here.")
  return lines


def _list(sentences: list[str]) -> str:
  return "\n".join(f"- {one}" for one in sentences)


def for_terminal(cells: pd.DataFrame, title: str, *, width: int) -> Table:
  """As a rich table that fits.

  Where a terminal is narrow, columns that matter least are left out and named;
  then what all rows share goes into the title, ranges go below their numbers,
  and names are folded. Method, trained parameters, score and difference stay.
  """
  # A heading may take several lines, a cell may not.
  headings = {
    name: "\n".join(_heading(str(name), cells[name].map(len).max()))
    for name in cells
  }
  widths = _widths(cells, headings)
  spared: list[str] = []
  for name in SPARED:
    if name in cells and _total(widths.drop(spared)) > width:
      spared.append(name)
  shown = cells.drop(columns=spared)
  if folded := _total(widths.drop(spared)) > width:
    for name in [x for x in NAMES if x in shown and x != "method"]:
      if len(shown) > 1 and shown[name].nunique() == 1:
        title = f"{title}, {shown[name].iloc[0]}"
        shown = shown.drop(columns=name)
    for name in [x for x in shown if x not in LEFT]:
      shown[name] = shown[name].str.replace(" (", "\n(")
      longest = shown[name].str.split("\n").map(lambda x: max(map(len, x)))
      headings[name] = "\n".join(_heading(str(name), longest.max()))
    widths = _widths(shown, headings).drop([*LEFT], errors="ignore")
    # verdicts are about the paper's numbers, and keep them
    paper = [x for x in widths.index if x.startswith("paper")]
    for name in paper if "method" in shown else ():
      if _total(widths) + NARROW > width:
        spared.append(name)
        shown, widths = shown.drop(columns=name), widths.drop(name)
    # the rest of the width is for names, and for the signs behind them
    apart = ["task"] if _total(widths) + 2 * NARROW <= width else []
    if joined := [x for x in NAMES if x in shown and x not in apart]:
      signs = shown.get(SIGNS, pd.Series("", shown.index))
      texts = [
        ", ".join(filter(None, names)) + (f" ({sign})" if sign else "")
        for names, sign in zip(shown[joined].to_numpy(), signs, strict=True)
      ]
      shown = shown.drop(columns=[*joined, SIGNS], errors="ignore")
      shown.insert(int("task" in shown), "method", texts)
  caption = f"no room for: {', '.join(spared)}" if spared else None
  no_names = folded and "method" in shown and _total(widths) + NARROW > width
  if no_names:  # which a row can't do without
    return _below_each_other(shown, title, caption)
  table = Table(
    title=title,
    title_justify="left",
    caption_justify="left",
    show_lines=folded,
  )
  table.caption = caption
  for name in shown:
    text = name in LEFT
    table.add_column(
      headings[name],
      justify="left" if text else "right",
      no_wrap=not text,
      overflow="fold",
    )
  for (_, row), signs in zip(
    shown.iterrows(), cells.get(SIGNS, [""] * len(cells)), strict=True
  ):
    table.add_row(*row, style="red" if COLLAPSED in signs else None)
  return table


def _below_each_other(
  cells: pd.DataFrame, title: str, caption: str | None
) -> Table:
  """A table's rows, one column below the other: for the narrowest terminals."""
  table = Table(
    title=title,
    title_justify="left",
    caption=caption,
    caption_justify="left",
    show_header=False,
    box=None,
  )
  table.add_column(overflow="fold")
  table.add_column(justify="right", no_wrap=True)
  for _, row in cells.iterrows():
    table.add_row(", ".join(row[x] for x in NAMES if x in row), style="bold")
    for name, text in row.items():
      if text and name not in NAMES:
        table.add_row(f"  {name}", text)
  return table


def _heading(name: str, longest: int) -> list[str]:
  return textwrap.wrap(
    name,
    max(10, longest),
    break_on_hyphens=False,
    break_long_words=False,
  )


def _widths(cells: pd.DataFrame, headings: Mapping[str, str]) -> pd.Series:
  """Letters of each column's longest line."""
  return pd.Series(
    {
      name: max(
        len(line)
        for text in (headings[name], *cells[name])
        for line in text.split("\n")
      )
      for name in cells
    }
  )


def _total(widths: pd.Series) -> int:
  """Each column has two spaces and a rule, and one rule closes the table."""
  return 1 + int((widths + 3).sum())


def notes(sweep: Sweep, table: pd.DataFrame) -> list[str]:
  """What stands below the table, one sentence each."""
  lines = []
  if (table["pairs"] > 0).any():
    loras = table[table["method"] == BASELINE].groupby("task").size()
    which = " that has the best median" if loras.max() > 1 else ""
    if sweep.runs.groupby("task")["data"].nunique().max() > 1:
      which = f" of the same base and data{which}"
    lines.append(
      "Difference from LoRA: the mean over the seeds that both have, against"
      f" the LoRA condition{which}, with Student's 95 % interval; p of the"
      " paired t-test, adjusted by Holm for the number of comparisons in this"
      " table."
    )
  lines += _ranks(table) + _convergence(sweep.runs)
  for failure in sweep.failed:
    reason = str(failure.get("failed", "")) or "no reason is known"
    lines.append(f"{failure['run']} failed: {reason.splitlines()[0]}")
  return lines + list(sweep.remarks)


def _ranks(table: pd.DataFrame) -> list[str]:
  """The smallest rank whose median lies within the spread of the best rank's.

  One sentence per task and method that has several ranks.
  """
  lines = []
  for (task, method), group in table.groupby(["task", "method"], sort=False):
    if group["rank"].nunique() < 2:
      continue
    best = group.loc[group["score"].idxmax()]
    near = group[group["score"] >= best["low"]]
    least = near.loc[near["rank"].astype(float).idxmin()]
    lines.append(
      f"{task}, {method}: best at rank {best['rank']:.0f}"
      f" ({best['score']:.1f}); the smallest rank within its spread is"
      f" {least['rank']:.0f} ({least['score']:.1f},"
      f" {least['adapter']:,} parameters)."
    )
  return lines


def _convergence(runs: pd.DataFrame) -> list[str]:
  """How fast each method's best rate brings the training loss down.

  One sentence per task and method of which several learning rates were run on
  the same examples: the condition whose last median loss is lowest, that loss,
  and the first epoch in which it is at or below the last one of LoRA's best
  condition.
  """
  curves, sizes = {}, {}
  for key, group in runs.groupby(["task", "method"], sort=False):
    if group["rate"].nunique() > 1 and group["shots"].nunique() < 2:
      medians = history(group).groupby(["condition", "epoch"])["loss"].median()
      losses = medians.unstack("epoch")
      best = losses.iloc[:, -1].idxmin()
      curves[key] = losses.loc[best]
      sizes[key] = group.groupby("condition")["adapter"].first()[best]
  lines = []
  for (task, method), curve in curves.items():
    text = (
      f"{task}, {method}: the training loss ends lowest with {curve.name},"
      f" at {curve.iloc[-1]:.4f} ({sizes[task, method]:,} parameters)"
    )
    if method != BASELINE and (task, BASELINE) in curves:
      below = curve <= curves[task, BASELINE].iloc[-1]
      text += (
        f"; it reaches LoRA's last loss in epoch {below.idxmax()}"
        if below.any()
        else "; it doesn't reach LoRA's last loss"
      )
    lines.append(f"{text}.")
  return lines
