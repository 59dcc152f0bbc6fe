"""The figures of a sweep: scores, learning curves, ranks."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from vera_jax.report.frame import Sweep, history, norms
from vera_jax.report.style import (
  BLACK,
  METHOD,
  METRIC,
  ORANGE,
  STYLE,
  grid,
  label,
  median_line,
  save,
  task_title,
)
from vera_jax.report.vector_plots import (
  norm_figure,
  spectrum_figure,
  vector_figure,
)

__all__ = [
  "curve_figure",
  "figures",
  "norm_figure",
  "rank_figure",
  "save",
  "score_figure",
  "spectrum_figure",
  "vector_figure",
]

# Where a label may stand beside its point: the nearest that is free.
PLACES = (
  *((0, 1), (-1, 0), (1, 0), (0, -1)),
  *((-1, 1), (1, 1), (-1, -1), (1, -1)),
  *((-2, 0), (2, 0), (0, 2), (0, -2), (-2, 1), (-2, -1), (-3, 0), (3, 0)),
)
MOST = 7  # lines that one panel can tell apart


def figures(sweep: Sweep, table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
  """(name, figure) of all that the results give; `table` is the summary."""
  yield "scores", score_figure(table, sweep.runs, title=sweep.title)
  if len(history(sweep.runs)["epoch"].unique()) > 1:
    yield "curves", curve_figure(sweep.runs, table, title=sweep.title)
  if any(
    group["rank"].nunique() > 1
    for _, group in table.groupby(["task", "method"])
  ):
    yield "ranks", rank_figure(table, title=sweep.title)
  vectors = norms(sweep.runs)
  if not vectors.empty and vectors["leaf"].isin(["d", "b"]).any():
    yield "norms", norm_figure(vectors, title=sweep.title)


def score_figure(
  table: pd.DataFrame, runs: pd.DataFrame, *, title: str = ""
) -> Figure:
  """Every seed, the median, the paper's number; collapsed runs are hollow."""
  with mpl.rc_context(STYLE):
    tasks = list(dict.fromkeys(table["task"]))
    lines = [
      sum(label(r["method"], r["condition"]).count("\n") + 1 for _, r in rows)
      for rows in (table[table["task"] == t].iterrows() for t in tasks)
    ]
    height = 0.8 + 0.26 * max(lines)
    columns = min(2, len(tasks))
    figure, axes = grid(
      -(-len(tasks) // columns), columns, width=5.2, height=height, title=title
    )
    for ax, task in itertools.zip_longest(axes.flat, tasks):
      if task is None:
        ax.set_visible(False)
        continue
      _scores(ax, table[table["task"] == task], runs[runs["task"] == task])
    figure.legend(
      handles=_score_key(table), loc="outside lower center", ncols=4
    )
    return figure


def _scores(ax: Axes, table: pd.DataFrame, runs: pd.DataFrame) -> None:
  names = []
  for place, (_, row) in enumerate(table.iterrows()):
    color, marker, _ = METHOD[row["method"]]
    names.append(label(row["method"], row["condition"]))
    own = runs[
      (runs["method"] == row["method"])
      & (runs["condition"] == row["condition"])
    ]
    ax.plot([row["low"], row["high"]], [place] * 2, color=color, zorder=2)
    for hollow, some in own.groupby("collapsed"):
      ax.scatter(
        some["score"],
        [place] * len(some),
        s=22,
        marker=marker,
        facecolors="white" if hollow else color,
        edgecolors=color,
        alpha=1 if hollow else 0.6,
        zorder=3,
      )
    ax.plot(row["score"], place, "|", color=BLACK, ms=13, mew=1.8, zorder=4)
    if row["paper"] is not None and not np.isnan(row["paper"]):
      ax.plot(row["paper"], place, "*", color=ORANGE, mec=BLACK, ms=9, mew=0.6)
  ax.set_yticks(range(len(names)), names)
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.grid(axis="y", visible=False)
  first = table.iloc[0]
  ax.set_title(task_title(first["task"]))
  ax.set_xlabel(f"{METRIC[first['metric']]} on dev, best epoch (%)")


def _score_key(table: pd.DataFrame) -> list[Any]:
  plain: Any = {"linestyle": "none", "color": BLACK}
  keys = [
    Line2D([], [], marker="o", alpha=0.6, label="a seed", **plain),
    Line2D([], [], marker="|", ms=11, mew=1.8, label="median", **plain),
  ]
  if table["collapsed"].any():
    keys.append(
      Line2D([], [], marker="o", mfc="white", label="collapsed", **plain)
    )
  if table["paper"].notna().any():
    star: Any = {"linestyle": "none", "color": ORANGE, "mec": BLACK, "ms": 9}
    keys.append(Line2D([], [], marker="*", label="the paper's", **star))
  return keys


def curve_figure(
  runs: pd.DataFrame, table: pd.DataFrame, *, title: str = ""
) -> Figure:
  """Score and training loss by epoch: median, with the seeds' range.

  Where a task has more conditions than a panel can tell apart, the best ones.
  """
  with mpl.rc_context(STYLE):
    tasks = list(dict.fromkeys(runs["task"]))
    figure, axes = grid(len(tasks), 2, width=4.4, height=2.9, title=title)
    epochs = history(runs)
    for row, task in zip(axes, tasks, strict=True):
      best = table[table["task"] == task]
      chosen = best.loc[best["score"].nlargest(MOST).index.sort_values()]
      for place, (_, condition) in enumerate(chosen.iterrows()):
        some = epochs[
          (epochs["task"] == task)
          & (epochs["method"] == condition["method"])
          & (epochs["condition"] == condition["condition"])
        ]
        _curve(row[0], some, "score", place, condition)
        _curve(row[1], some, "loss", place, condition)
      more = len(best) - len(chosen)
      kept = f" (best {MOST} of {len(best)})" if more else ""
      row[0].set_title(f"{task_title(task)}{kept}")
      row[0].set_ylabel(f"{METRIC[best.iloc[0]['metric']]} on dev (%)")
      row[1].set_ylabel("training loss")
      row[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    for ax in axes.flat:
      ax.set_xlabel("epoch")
      ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _curve(
  ax: Axes, epochs: pd.DataFrame, what: str, place: int, condition: pd.Series
) -> None:
  name = label(condition["method"], condition["condition"])
  median_line(ax, epochs.groupby("epoch")[what], place, label=name)


def rank_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
  """Score against trained adapter parameters: the paper's Figure 2."""
  with mpl.rc_context(STYLE):
    ranked = table[table["rank"].notna()]
    tasks = list(dict.fromkeys(ranked["task"]))
    figure, axes = grid(1, len(tasks), width=5.4, height=3.4, title=title)
    for ax, task in zip(axes.flat, tasks, strict=True):
      here = ranked[ranked["task"] == task]
      for method, some in here.groupby("method", sort=False):
        _rank_line(ax, str(method), some)
      ax.set_xscale("log")
      ax.set_title(task_title(task))
      ax.set_xlabel("trained adapter parameters")
      metric = METRIC[here.iloc[0]["metric"]]
      ax.set_ylabel(f"{metric} on dev, best epoch (%)")
      ax.margins(y=0.14)
      ax.xaxis.set_major_formatter(FuncFormatter(_count))
      ax.xaxis.set_minor_locator(NullLocator())
    figure.legend(
      *axes.flat[0].get_legend_handles_labels(),
      loc="outside lower center",
      ncols=2,
    )
    for ax, task in zip(axes.flat, tasks, strict=True):
      _name_ranks(figure, ax, ranked[ranked["task"] == task])
    return figure


def _rank_line(ax: Axes, method: str, rows: pd.DataFrame) -> None:
  """Medians joined by a line; a bar is the seeds' range."""
  color, marker, name = METHOD[method]
  rows = rows.sort_values("adapter")
  below, over = rows["score"] - rows["low"], rows["high"] - rows["score"]
  ax.errorbar(
    rows["adapter"],
    rows["score"],
    yerr=np.stack([below, over]),
    color=color,
    marker=marker,
    ms=5,
    capsize=2,
    elinewidth=0.8,
    label=f"{name}, r at each point",
  )


def _name_ranks(figure: Figure, ax: Axes, table: pd.DataFrame) -> None:
  """The rank at each point, where no other label or bar lies."""
  figure.draw_without_rendering()  # now the axes' place is known
  at = ax.transData.transform
  scale = figure.dpi / 72  # pixels a point
  taken = [
    Bbox([at((x, low)) - 4 * scale, at((x, high)) + 4 * scale])
    for x, low, high in zip(
      table["adapter"], table["low"], table["high"], strict=True
    )
  ]
  for _, line in table.groupby("method"):
    points = line[["adapter", "score"]].to_numpy(float)
    taken += _along(list(at(points)))
  for _, row in table.iterrows():
    text, width = str(int(row["rank"])), 5.0 * len(str(int(row["rank"])))
    for way in PLACES:
      middle = np.array(way) * (8 + np.array([width / 2, 3.5])) * scale
      middle += at((row["adapter"], row["score"]))
      half = np.array([width / 2, 4.0]) * scale
      box = Bbox([middle - half, middle + half])
      if not any(box.overlaps(other) for other in taken):
        break
    taken.append(box)
    offset = (middle - at((row["adapter"], row["score"]))) / scale
    ax.annotate(
      text,
      (row["adapter"], row["score"]),
      xytext=tuple(offset),
      textcoords="offset points",
      ha="center",
      va="center",
      fontsize=7.5,
      color=METHOD[row["method"]][0],
    )


def _along(points: Sequence[np.ndarray]) -> list[Bbox]:
  """Small boxes on the line through points, in order of their x."""
  ordered = sorted(points, key=lambda point: point[0])
  steps = np.linspace(0, 1, 25)[:, None]
  return [
    Bbox([middle - 1, middle + 1])
    for a, b in itertools.pairwise(ordered)
    for middle in a + steps * (b - a)
  ]


def _count(value: float, place: int) -> str:
  del place
  for unit, name in ((1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:g}{name}"
  return f"{value:g}"
