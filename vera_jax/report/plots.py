"""The figures of a sweep: scores, learning curves, ranks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from vera_jax.report.frame import (
  RUN,
  Sweep,
  history,
  method_title,
  norms,
  steps,
)
from vera_jax.report.style import (
  BLACK,
  METHOD_COLORS,
  ORANGE,
  OTHER,
  SEEDS,
  STYLE,
  VARIANTS,
  grid,
  label,
  median_line,
  metric_title,
  save,
  task_title,
)
from vera_jax.report.summary import BY, summary
from vera_jax.report.text_scores import text_scores
from vera_jax.report.vector_plots import (
  norm_figure,
  spectrum_figure,
  vector_figure,
)

__all__ = [
  "curve_figure",
  "figures",
  "loss_figure",
  "method_figure",
  "norm_figure",
  "rank_figure",
  "save",
  "score_figure",
  "spectrum_figure",
  "vector_figure",
]

MOST = 7  # lines that one panel can tell apart
POINTS = 50  # of a line
RANGE = ["low", "score", "high"]  # columns of a summary: the seeds'
FEW = 4  # values of a setting that each have a tick; of more, powers of ten


class Setting(NamedTuple):
  """A column of a summary that scores are drawn against, and its axis."""

  column: str
  axis: str


SETTINGS = {  # by the figure's name
  "shots": Setting("shots", "training examples per class"),
  "rates": Setting("rate", "learning rate"),
}


def figures(sweep: Sweep, table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
  """(name, figure) of all that the results give; `table` is the summary."""
  yield "scores", score_figure(table, sweep.runs, title=sweep.title)
  if history(sweep.runs)["epoch"].nunique() > 1:
    yield "curves", curve_figure(sweep.runs, table, title=sweep.title)
  logged = steps(sweep.runs)
  if not logged.empty and logged["step"].nunique() > 1:
    yield "losses", loss_figure(logged, table, title=sweep.title)
  if texts := text_scores(sweep):
    of_texts = summary(texts)
    title = f"{sweep.title}: test texts"
    yield "texts", score_figure(of_texts, texts.runs, title=title, of="")
  for name, setting in SETTINGS.items():
    if not _varied(table, setting.column).empty:
      yield name, setting_figure(table, setting, title=sweep.title)
      break  # more examples may have had rates of their own
  if (table.groupby(["task", "method"])["rank"].nunique() > 1).any():
    yield "ranks", rank_figure(table, title=sweep.title)
  elif table.groupby("task")["method"].nunique().max() > 3:
    yield "methods", method_figure(table, title=sweep.title)
  vectors = norms(sweep.runs)
  if not vectors.empty and vectors["leaf"].isin(["d", "b"]).any():
    yield "norms", norm_figure(vectors, title=sweep.title)


def score_figure(
  table: pd.DataFrame,
  runs: pd.DataFrame,
  *,
  title: str = "",
  of: str = ", best epoch (%)",
) -> Figure:
  """Every seed, the median, the paper's number; collapsed runs are hollow.

  A panel per task and metric.

  Args:
    table: a `summary`.
    runs: the runs of the same sweep.
    title: the figure's title.
    of: what was scored, behind the metric's name.
  """
  pairs = table[["method", "condition"]].to_numpy()
  table = table.assign(name=[label(*pair) for pair in pairs])
  tasks = list(table.groupby(["task", "metric"], sort=False))
  by_condition = runs.groupby(BY)
  with mpl.rc_context(STYLE):
    lines = [here["name"].str.count("\n").add(1).sum() for _, here in tasks]
    columns = min(2, len(tasks))
    figure, axes = grid(
      -(-len(tasks) // columns),
      columns,
      width=5.2,
      height=0.8 + 0.26 * max(lines),
      title=title,
    )
    for ax in axes.flat[len(tasks) :]:
      ax.set_visible(False)
    for ax, ((task, metric), here) in zip(axes.flat, tasks, strict=False):
      for line, (_, row) in enumerate(here.iterrows()):
        color, marker = METHOD_COLORS.get(row["method"], OTHER)
        ax.plot([row["low"], row["high"]], [line] * 2, color=color, zorder=2)
        seeds = by_condition.get_group(tuple(row[BY]))
        for hollow, some in seeds.groupby("collapsed"):
          ax.scatter(
            some["score"],
            [line] * len(some),
            s=22,
            marker=marker,
            facecolors="white" if hollow else color,
            edgecolors=color,
            alpha=1 if hollow else 0.6,
            zorder=3,
          )
        ax.plot(row["score"], line, "|", color=BLACK, ms=13, mew=1.8, zorder=4)
        if pd.notna(paper := row["paper"]):
          ax.plot(paper, line, "*", color=ORANGE, mec=BLACK, ms=9, mew=0.6)
      ax.set_yticks(range(len(here)), here["name"])
      ax.set_ylim(len(here) - 0.4, -0.6)
      ax.grid(axis="y", visible=False)
      ax.set(title=task_title(task), xlabel=f"{metric_title(metric)}{of}")

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
      star: Any = {**plain, "color": ORANGE, "mec": BLACK, "ms": 9}
      keys.append(Line2D([], [], marker="*", label="the paper's", **star))
    figure.legend(handles=keys, loc="outside lower center", ncols=4)
    return figure


def curve_figure(
  runs: pd.DataFrame, table: pd.DataFrame, *, title: str = ""
) -> Figure:
  """Score and training loss by epoch: median, with the seeds' range.

  Where a task has more conditions than a panel can tell apart, the best ones.
  """
  tasks = list(table.groupby("task", sort=False))
  by_condition = history(runs).groupby(BY)
  with mpl.rc_context(STYLE):
    figure, axes = grid(len(tasks), 2, width=4.4, height=2.9, title=title)
    for (scores, losses), (task, here) in zip(axes, tasks, strict=True):
      best = here["score"].nlargest(MOST).index.sort_values()
      for line, (_, row) in enumerate(here.loc[best].iterrows()):
        epochs = by_condition.get_group(tuple(row[BY])).groupby("epoch")
        name = label(row["method"], row["condition"])
        median_line(scores, epochs["score"], line, label=name)
        median_line(losses, epochs["loss"], line, label=name)
      left_out = len(here) > len(best)
      kept = f" (best {MOST} of {len(here)})" if left_out else ""
      metric = metric_title(here.iloc[0]["metric"])
      title = f"{task_title(str(task))}{kept}"
      scores.set(title=title, xlabel="epoch", ylabel=f"{metric} (%)")
      losses.set(xlabel="epoch", ylabel="training loss")
      losses.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), title=SEEDS)
    for ax in axes.flat:
      ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def loss_figure(
  logged: pd.DataFrame, table: pd.DataFrame, *, title: str = ""
) -> Figure:
  """Training loss by step: median, with the seeds' range.

  Of a long run the mean over neighbouring steps, in about `POINTS` points.
  Where a task has more conditions than a panel can tell apart, the best ones.

  Args:
    logged: from `frame.steps`.
    table: the `summary` of the same runs.
    title: the figure's title.
  """
  width = max(1, logged["step"].max() // POINTS)
  ends = -(-logged["step"] // width) * width
  by_run = logged.assign(step=ends).groupby([*RUN, "step"], as_index=False)
  by_condition = by_run["loss"].mean().groupby(BY)
  there = table[[tuple(key) in by_condition.groups for key in table[BY].values]]
  tasks = list(there.groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid(len(tasks), 1, width=6.0, height=3.2, title=title)
    for ax, (task, here) in zip(axes.flat, tasks, strict=True):
      best = here["score"].nlargest(MOST).index.sort_values()
      for line, (_, row) in enumerate(here.loc[best].iterrows()):
        seeds = by_condition.get_group(tuple(row[BY])).groupby("step")["loss"]
        name = label(row["method"], row["condition"])
        median_line(ax, seeds, line, label=name)
      ax.set(title=task_title(str(task)), xlabel="step", ylabel="training loss")
      ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), title=SEEDS)
    return figure


def rank_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
  """Score against trained adapter parameters: the paper's Figure 2.

  Medians joined by a line for each method, whose ranks the legend names from
  left to right; a bar is the seeds' range.
  """
  return _parameter_figure(table[table["rank"].notna()], title=title)


def method_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
  """Score against trained adapter parameters, a point for each condition.

  The bar is the seeds' range. What trains no adapter is left out: the axis has
  no zero.
  """
  sized = table[table["adapter"] > 0]
  return _parameter_figure(sized.assign(rank=None), title=title)


def setting_figure(
  table: pd.DataFrame, setting: Setting, *, title: str = ""
) -> Figure:
  """Score against a setting: medians, and bars over the seeds' range.

  A panel per task and a line per method. A mean probability of tokens is drawn
  as the loss that it stands for: minus its logarithm, in nats per token. Losses
  well above that of the lowest setting, as of runs that diverged, lie outside
  of the panel, or nothing else could be seen.
  """
  column = setting.column
  tasks = list(_varied(table, column).groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid(1, len(tasks), width=5.0, height=3.4, title=title)
    for ax, (task, rows) in zip(axes.flat, tasks, strict=True):
      metric = str(rows.iloc[0]["metric"])
      of_tokens = metric == "token_probability"
      if of_tokens:
        losses = -np.log(rows[["high", "score", "low"]] / 100)
        rows = rows.assign(**dict(zip(RANGE, losses.to_numpy().T, strict=True)))
        lowest = rows.groupby("method")[column].idxmin()
        bottom, top = rows["low"].min(), rows["high"][lowest].max()
        margin = max(top - bottom, top / 20) / 4
        ax.set_ylim(bottom - margin, top + margin)
      methods = list(rows.groupby("method", sort=False))
      for number, (method, rows_of_method) in enumerate(methods):
        rows_of_method = rows_of_method.sort_values(column)
        # a little apart, so that no bar hides another
        apart = 1.03 ** (number - (len(methods) - 1) / 2)
        _line_with_bars(
          ax, apart * rows_of_method[column], rows_of_method, str(method)
        )
      score = f"{metric_title(metric)} (%)"
      ax.set(
        title=task_title(str(task)),
        xscale="log",
        xlabel=setting.axis,
        ylabel=f"{'loss (nats per token)' if of_tokens else score}, best epoch",
      )
      values = sorted(rows[column].unique())
      if len(values) <= FEW:
        ax.set_xticks(values)
      ax.xaxis.set_major_formatter("{x:g}")
      ax.xaxis.set_minor_locator(NullLocator())
      ax.legend(loc="best")
    return figure


def _varied(table: pd.DataFrame, column: str) -> pd.DataFrame:
  """The rows of methods whose conditions differ in this column alone."""
  groups = table.groupby(["task", "metric", "method"])[column]
  several = groups.transform("nunique") > 1
  return table[
    several & (groups.transform("nunique") == groups.transform("size"))
  ]


def _parameter_figure(table: pd.DataFrame, *, title: str) -> Figure:
  """A panel for each task; a method's legend has its ranks where it has any."""
  tasks = list(table.groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid(1, len(tasks), width=7.4, height=3.4, title=title)
    for ax, (task, here) in zip(axes.flat, tasks, strict=True):
      for method, rows in here.groupby("method", sort=False):
        rows = rows.sort_values("adapter")
        ranks = [f"{rank:.0f}" for rank in rows["rank"].dropna()]
        named = f", r = {', '.join(ranks)}" if ranks else ""
        _line_with_bars(ax, rows["adapter"], rows, str(method), named)
      metric = metric_title(here.iloc[0]["metric"])
      ax.set(
        title=task_title(str(task)),
        xscale="log",
        xlabel="trained adapter parameters",
        ylabel=f"{metric}, best epoch (%)",
      )
      ax.margins(x=0.15, y=0.14)
      ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      ax.xaxis.set_major_formatter(EngFormatter(sep=""))
      ax.xaxis.set_minor_locator(NullLocator())
      ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _line_with_bars(
  ax: Axes, xs: Any, rows: pd.DataFrame, method: str, named: str = ""
) -> None:
  """A method's line through its medians, with bars over the seeds' range.

  `named` is what the legend has behind the method's name.
  """
  low, middle, high = rows[RANGE].to_numpy(float).T
  color, marker = METHOD_COLORS.get(method, OTHER)
  ax.errorbar(
    xs,
    middle,
    yerr=[middle - low, high - middle],
    color=color,
    marker=marker,
    linestyle="--" if method in VARIANTS else "-",
    ms=5,
    capsize=2,
    elinewidth=0.8,
    label=method_title(method) + named,
  )
