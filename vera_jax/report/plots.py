"""The figures of a sweep: scores, learning curves, ranks."""

from collections.abc import Iterator, Sequence
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
  LETTER,
  LINE,
  ORANGE,
  SEEDS,
  STYLE,
  TEXT,
  VARIANTS,
  beside,
  grid,
  inside,
  label,
  legend,
  look,
  looks,
  median_line,
  save,
)
from vera_jax.report.summary import BY, summary
from vera_jax.report.text_scores import text_scores
from vera_jax.report.vector_plots import (
  norm_figure,
  spectrum_figure,
  vector_figure,
)
from vera_jax.report.words import metric_title, task_title, words

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

MOST = 6  # lines that one panel can tell apart
ROWS = 10  # that a panel of scores has at most
POINTS = 50  # of a line
RANGE = ["low", "score", "high"]  # columns of a summary: the seeds'
FEW = 4  # values of a setting that each have a tick; of more, powers of ten


class Setting(NamedTuple):
  """A column of a summary that scores are drawn against, and its axis."""

  column: str
  axis: str


# The key of a triangle at a panel's edge.
OUTSIDE = Line2D(
  [],
  [],
  marker="<",
  linestyle="none",
  color=BLACK,
  mfc="white",
  label="off the axis",
)
SETTINGS = {  # by the figure's name
  "shots": Setting("shots", "training examples per class"),
  "rates": Setting("rate", "learning rate"),
}


def figures(
  sweep: Sweep, table: pd.DataFrame, *, width: float | None = None
) -> Iterator[tuple[str, Figure]]:
  """(name, figure) of all that the results give.

  Args:
    sweep: the results.
    table: its summary.
    width: inches, of a figure in a paper, which has its title in the caption.
  """
  page: Any = {"title": sweep.title, "width": width}
  yield (
    "scores",
    score_figure(
      # numbers of another model would be most of the axis
      table.assign(paper=None) if sweep.paper else table,
      sweep.runs,
      **page,
    ),
  )
  if history(sweep.runs)["epoch"].nunique() > 1:
    yield "curves", curve_figure(sweep.runs, table, **page)
  logged = steps(sweep.runs)
  if not logged.empty and logged["step"].nunique() > 1:
    yield "losses", loss_figure(logged, table, **page)
  if texts := text_scores(sweep):
    of_texts = summary(texts)
    of_page = page | {"title": f"{sweep.title}: test texts"}
    yield "texts", score_figure(of_texts, texts.runs, of="", **of_page)
  for name, setting in SETTINGS.items():
    if not _varied(table, setting.column).empty:
      yield name, setting_figure(table, setting, **page)
      break  # more examples may have had rates of their own
  if (table.groupby(["task", "method"])["rank"].nunique() > 1).any():
    yield "ranks", rank_figure(table, **page)
  elif table.groupby("task")["method"].nunique().max() > 3:
    yield "methods", method_figure(table, **page)
  vectors = norms(sweep.runs)
  if not vectors.empty and vectors["leaf"].isin(["d", "b"]).any():
    yield "norms", norm_figure(vectors, **page)


def score_figure(
  table: pd.DataFrame,
  runs: pd.DataFrame,
  *,
  title: str = "",
  of: str = ", best epoch (%)",
  width: float | None = None,
) -> Figure:
  """Every seed, the median, the paper's number; collapsed runs are hollow.

  A panel per task and metric, or several where they have more rows than
  `ROWS`; what all rows of such a panel share is in its title. Outliers stand at
  the edge of the axis with their values.

  Args:
    table: a `summary`.
    runs: the runs of the same sweep.
    title: the figure's title.
    of: what was scored, behind the metric's name.
    width: of the figure, in inches.
  """
  least = 3.0
  by_condition = runs.groupby(BY)
  panels = [
    (task, metric, shared, rows)
    for (task, metric), here in table.groupby(["task", "metric"], sort=False)
    for shared, rows in _panels(here)
  ]
  columns = beside(len(panels), width, least=least)
  letters = int(0.45 * (width or TEXT) / columns / LETTER)
  named = [
    [
      label(*pair, letters=letters)
      for pair in rows[["method", "rest"]].to_numpy()
    ]
    for *_, rows in panels
  ]
  with mpl.rc_context(STYLE):
    figure, axes = grid(
      [
        0.75 + LINE * sum(1 + name.count("\n") for name in names)
        for names in named
      ],
      width=width,
      least=least,
      title=title,
    )
    outside: list[Any] = []
    for ax, names, (task, metric, shared, rows) in zip(
      axes, named, panels, strict=True
    ):
      of_task = runs[(runs["task"] == task) & (runs["metric"] == metric)]
      low, high = inside(
        of_task["score"].to_numpy(float),
        of_task["score"][~of_task["collapsed"]].to_numpy(float),
      )
      if rows["paper"].notna().any():
        low, high = (
          min(low, rows["paper"].min()),
          max(high, rows["paper"].max()),
        )
      margin = 0.06 * (high - low) or 1
      ax.set_xlim(low - margin, high + margin)
      for line, (_, row) in enumerate(rows.iterrows()):
        color, marker = look(row["method"])
        seeds = by_condition.get_group(tuple(row[BY]))
        shown = seeds[seeds["score"].between(low, high)]
        if len(shown):
          ends = [shown["score"].min(), shown["score"].max()]
          ax.plot(ends, [line] * 2, color=color, zorder=2)
        for hollow, some in shown.groupby("collapsed"):
          ax.scatter(
            some["score"],
            [line] * len(some),
            s=18,
            marker=marker,
            facecolors="white" if hollow else color,
            edgecolors=color,
            alpha=1 if hollow else 0.6,
            zorder=3,
          )
        if low <= row["score"] <= high:
          ax.plot(
            row["score"], line, "|", color=BLACK, ms=10, mew=1.5, zorder=4
          )
        for sign, beyond in (
          (-1, seeds[seeds["score"] < low]["score"]),
          (1, seeds[seeds["score"] > high]["score"]),
        ):
          if len(beyond):
            outside = [OUTSIDE]
            _mark_outside(ax, line, beyond, color, sign=sign)
        if pd.notna(paper := row["paper"]):
          ax.plot(paper, line, "*", color=ORANGE, mec=BLACK, ms=8, mew=0.6)
      ax.set_yticks(range(len(rows)), names)
      ax.set_ylim(len(rows) - 0.4, -0.6)
      ax.grid(axis="y", visible=False)
      ax.xaxis.set_major_locator(MaxNLocator(5))
      heading = f"{task_title(task)}{', ' if shared else ''}{shared}"
      ax.set(title=heading, xlabel=f"{metric_title(metric)}{of}")

    plain: Any = {"linestyle": "none", "color": BLACK}
    keys: list[Any] = [
      Line2D([], [], marker="o", alpha=0.6, label="a seed", **plain),
      Line2D([], [], marker="|", ms=9, mew=1.5, label="median", **plain),
    ]
    if table["collapsed"].any():
      keys.append(
        Line2D([], [], marker="o", mfc="white", label="collapsed", **plain)
      )
    keys += outside
    if table["paper"].notna().any():
      star: Any = {**plain, "color": ORANGE, "mec": BLACK, "ms": 8}
      keys.append(Line2D([], [], marker="*", label="the paper's", **star))
    legend(figure, keys=keys)
    return figure


def _panels(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
  """(what all rows of a panel share, in words, its rows), of one task.

  Many rows of one method are shared out by rank, those of several so that a
  method stays together, where that makes no panel of more than `ROWS`, and else
  as they come. Learning rates are in their order.
  """
  by_method = [
    some.sort_values("rate") if some["rate"].nunique() == len(some) else some
    for _, some in rows.groupby("method", sort=False)
  ]
  rows = pd.concat(by_method)
  if len(rows) <= ROWS:
    yield "", rows.assign(rest=rows["condition"])
    return
  panels = -(-len(rows) // ROWS)
  if len(by_method) == 1:
    groups = [
      some for _, some in rows.groupby("rank", sort=False, dropna=False)
    ]
  else:  # alike in size, if that takes no more panels
    alike = _together(by_method, -(-len(rows) // panels))
    groups = min(alike, _together(by_method, ROWS), key=len)
  if len(groups) == len(rows) or max(map(len, groups)) > ROWS:
    parts = np.array_split(np.arange(len(rows)), panels)
    groups = [rows.iloc[part] for part in parts]
  for some in groups:
    settings = [name.split(", ") for name in some["condition"]]
    shared = [
      one
      for one in settings[0]
      if len(some) > 1 and all(one in other for other in settings)
    ]
    rest = [
      ", ".join(one for one in other if one not in shared) for other in settings
    ]
    named = words(", ".join(shared)) if shared else ""
    yield named, some.assign(rest=rest)  # the runs have their whole condition


def _together(parts: Sequence[pd.DataFrame], most: int) -> list[pd.DataFrame]:
  """Neighbours in one table, as far as it has so many rows at most."""
  tables = [parts[0]]
  for part in parts[1:]:
    if len(tables[-1]) + len(part) <= most:
      tables[-1] = pd.concat([tables[-1], part])
    else:
      tables.append(part)
  return tables


def _mark_outside(
  ax: Axes, line: int, scores: pd.Series, color: str, *, sign: int
) -> None:
  """A triangle at the axis' end that points to scores beyond it.

  `sign` is -1 where they are lower.
  """
  at = (0.02 if sign < 0 else 0.98, line)
  across = ax.get_yaxis_transform()  # shares of the axis, and lines
  triangle = "<" if sign < 0 else ">"
  ax.plot(*at, triangle, color=color, mfc="white", zorder=5, transform=across)
  values = sorted({f"{score:.1f}" for score in scores}, key=float)
  ax.annotate(
    " to ".join(values[:1] + values[1:][-1:]),
    at,
    (-6 * sign, 0),
    xycoords=across,
    textcoords="offset points",
    ha="left" if sign < 0 else "right",
    va="center",
    fontsize=7,
  )


def _best(table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
  """The conditions that have lines, the best of each task, and how a line is
  drawn, the same for a condition in all panels."""
  kept = table.groupby("task", sort=False)["score"].nlargest(MOST)
  best = table.loc[kept.index.get_level_values(-1).sort_values()]
  lines = best[["method", "condition"]].drop_duplicates()
  drawn = dict(
    zip(map(tuple, lines.to_numpy()), looks(list(lines["method"])), strict=True)
  )
  pairs = map(tuple, best[["method", "condition"]].to_numpy())
  return best, [drawn[pair] for pair in pairs]


def curve_figure(
  runs: pd.DataFrame,
  table: pd.DataFrame,
  *,
  title: str = "",
  width: float | None = None,
) -> Figure:
  """Score and training loss by epoch: median, with the seeds' range.

  Where a task has more conditions than a panel can tell apart, the best ones.
  """
  by_condition = history(runs).groupby(BY)
  best, lines = _best(table)
  tasks = list(best.assign(look=lines).groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid(
      [2.3] * 2 * len(tasks), width=width, least=2.6, most=2, title=title
    )
    for scores, losses, (task, here) in zip(
      axes[0::2], axes[1::2], tasks, strict=True
    ):
      for _, row in here.iterrows():
        epochs = by_condition.get_group(tuple(row[BY])).groupby("epoch")
        name = label(row["method"], row["condition"])
        median_line(scores, epochs["score"], label=name, **row["look"])
        median_line(losses, epochs["loss"], label=name, **row["look"])
      count = (table["task"] == task).sum()
      kept = f" (best {MOST} of {count})" if count > len(here) else ""
      metric = metric_title(here.iloc[0]["metric"])
      heading = f"{task_title(str(task))}{kept}"
      scores.set(title=heading, xlabel="epoch", ylabel=f"{metric} (%)")
      losses.set(title=heading, xlabel="epoch", ylabel="training loss")
    for ax in axes:
      ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, title=SEEDS)
    return figure


def loss_figure(
  logged: pd.DataFrame,
  table: pd.DataFrame,
  *,
  title: str = "",
  width: float | None = None,
) -> Figure:
  """Training loss by step: median, with the seeds' range.

  Of a long run the mean over neighbouring steps, in about `POINTS` points.
  Where a task has more conditions than a panel can tell apart, the best ones.

  Args:
    logged: from `frame.steps`.
    table: the `summary` of the same runs.
    title: the figure's title.
    width: of the figure, in inches.
  """
  together = max(1, logged["step"].max() // POINTS)
  ends = -(-logged["step"] // together) * together
  by_run = logged.assign(step=ends).groupby([*RUN, "step"], as_index=False)
  by_condition = by_run["loss"].mean().groupby(BY)
  there = table[[tuple(key) in by_condition.groups for key in table[BY].values]]
  best, lines = _best(there)
  tasks = list(best.assign(look=lines).groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid([2.6] * len(tasks), width=width, least=3.0, title=title)
    for ax, (task, here) in zip(axes, tasks, strict=True):
      for _, row in here.iterrows():
        seeds = by_condition.get_group(tuple(row[BY])).groupby("step")["loss"]
        name = label(row["method"], row["condition"])
        median_line(ax, seeds, label=name, **row["look"])
      ax.set(title=task_title(str(task)), xlabel="step", ylabel="training loss")
    legend(figure, title=SEEDS)
    return figure


def rank_figure(
  table: pd.DataFrame, *, title: str = "", width: float | None = None
) -> Figure:
  """Score against trained adapter parameters: the paper's Figure 2.

  Medians joined by a line for each method, whose ranks the legend names from
  left to right; a bar is the seeds' range.
  """
  ranked = table[table["rank"].notna()]
  return _parameter_figure(ranked, title=title, width=width)


def method_figure(
  table: pd.DataFrame, *, title: str = "", width: float | None = None
) -> Figure:
  """Score against trained adapter parameters, by method.

  Of a method's conditions of one size the best; the bar is the seeds' range.
  What trains no adapter is left out: the axis has no zero.
  """
  sized = table[table["adapter"] > 0].assign(rank=None).sort_values("score")
  sized = sized.drop_duplicates(["task", "method", "adapter"], keep="last")
  sized = sized.sort_index()  # the methods in their order
  return _parameter_figure(sized, title=title, width=width)


def setting_figure(
  table: pd.DataFrame,
  setting: Setting,
  *,
  title: str = "",
  width: float | None = None,
) -> Figure:
  """Score against a setting: medians, and bars over the seeds' range.

  A panel per task and a line per method. A mean probability of tokens is drawn
  as the loss that it stands for: minus its logarithm, in nats per token.
  Outliers, and losses well above that of the lowest setting, as of runs that
  diverged, are marked at the panel's edge, or nothing else could be seen.
  """
  column = setting.column
  tasks = list(_varied(table, column).groupby("task", sort=False))
  with mpl.rc_context(STYLE):
    figure, axes = grid([2.6] * len(tasks), width=width, least=2.8, title=title)
    outside: list[Any] = []
    for ax, (task, rows) in zip(axes, tasks, strict=True):
      metric = str(rows.iloc[0]["metric"])
      of_tokens = metric == "token_probability"
      if of_tokens:
        losses = -np.log(rows[["high", "score", "low"]] / 100)
        rows = rows.assign(**dict(zip(RANGE, losses.to_numpy().T, strict=True)))
      if of_tokens:  # what diverges does so without a gap
        lowest = rows.groupby("method")[column].idxmin()
        bottom, top = rows["low"].min(), rows["high"][lowest].max()
        top += max(top - bottom, top / 20) / 4
      else:
        bottom, top = inside(
          rows[RANGE].to_numpy(float).ravel(),
          rows["score"][rows["collapsed"] == 0].to_numpy(float),
        )
      digits = ".1f" if of_tokens else ".0f"
      margin = 0.06 * (top - bottom) or 1
      ax.set_ylim(bottom - margin, top + margin)
      methods = list(rows.groupby("method", sort=False))
      for number, (method, rows_of_method) in enumerate(methods):
        rows_of_method = rows_of_method.sort_values(column)
        # a little apart, so that no bar hides another
        apart = 1.03 ** (number - (len(methods) - 1) / 2)
        xs = apart * rows_of_method[column]
        outside += _line_with_bars(
          ax, xs, rows_of_method, str(method), digits=digits, nth=number
        )
      score_name = f"{metric_title(metric)}, best epoch (%)"
      ax.set(
        title=task_title(str(task)),
        xscale="log",
        xlabel=setting.axis,
        ylabel="loss (nats per token)" if of_tokens else score_name,
      )
      values = sorted(rows[column].unique())
      if len(values) <= FEW:
        ax.set_xticks(values)
      ax.xaxis.set_major_formatter("{x:g}")
      ax.xaxis.set_minor_locator(NullLocator())
    legend(figure, keys=outside)
    return figure


def _varied(table: pd.DataFrame, column: str) -> pd.DataFrame:
  """The rows of methods whose conditions differ in this column alone."""
  groups = table.groupby(["task", "metric", "method"])[column]
  several = groups.transform("nunique") > 1
  return table[
    several & (groups.transform("nunique") == groups.transform("size"))
  ]


def _parameter_figure(
  table: pd.DataFrame, *, title: str, width: float | None
) -> Figure:
  """A panel for each task; the legend names a method's ranks, if it has any."""
  tasks = list(table.groupby("task", sort=False))
  ranks = {
    method: ", ".join(f"{rank:.0f}" for rank in sorted(some.dropna().unique()))
    for method, some in table.groupby("method")["rank"]
  }
  with mpl.rc_context(STYLE):
    figure, axes = grid([2.8] * len(tasks), width=width, least=3.0, title=title)
    outside: list[Any] = []
    for ax, (task, here) in zip(axes, tasks, strict=True):
      scores = here[RANGE].to_numpy(float).ravel()
      bottom, top = inside(scores, scores)
      margin = 0.1 * (top - bottom) or 1
      ax.set_ylim(bottom - margin, top + margin)
      methods = here.groupby("method", sort=False)
      for number, (method, rows) in enumerate(methods):
        rows = rows.sort_values("adapter")
        named = f", r = {ranks[method]}" if ranks[method] else ""
        outside += _line_with_bars(
          ax, rows["adapter"], rows, str(method), named, nth=number % 2
        )
      metric = metric_title(here.iloc[0]["metric"])
      ax.set(
        title=task_title(str(task)),
        xscale="log",
        xlabel="trained adapter parameters",
        ylabel=f"{metric}, best epoch (%)",
      )
      ax.margins(x=0.1)
      ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      ax.xaxis.set_major_formatter(EngFormatter(sep=""))
      ax.xaxis.set_minor_locator(NullLocator())
    legend(figure, keys=outside)
    return figure


def _line_with_bars(
  ax: Axes,
  xs: Any,
  rows: pd.DataFrame,
  method: str,
  named: str = "",
  *,
  digits: str = ".0f",
  nth: int = 0,
) -> list[Line2D]:
  """A method's line through its medians, with bars over the seeds' range.

  What the axis doesn't show has a triangle at its edge, with the value.

  Args:
    ax: the panel, with the limits of its scores.
    xs: where the points are.
    rows: of a summary.
    method: by its name.
    named: what the legend has behind that.
    digits: of values at the edge.
    nth: keeps these values apart from another method's.

  Returns:
    The legend's key of a triangle, if there is one.
  """
  low, middle, high = rows[RANGE].to_numpy(float).T
  color, marker = look(method)
  ax.errorbar(
    xs,
    middle,
    yerr=[middle - low, high - middle],
    color=color,
    marker=marker,
    linestyle="--" if method.split("+")[0] in VARIANTS else "-",
    ms=4.5,
    capsize=2,
    elinewidth=0.8,
    label=method_title(method) + named,
  )
  bottom, top = ax.get_ylim()
  keys = []
  for x, values in zip(xs, rows[RANGE].to_numpy(float), strict=True):
    for height, beyond, triangle, sign in (
      (0.03, values[values < bottom], "v", 1),
      (0.97, values[values > top], "^", -1),
    ):
      if not len(beyond):
        continue
      along = ax.get_xaxis_transform()  # the axis, and shares of the height
      keys = [OUTSIDE]
      shown = sorted({f"{value:{digits}}" for value in beyond}, key=float)
      ax.plot(x, height, triangle, color=color, mfc="white", transform=along)
      ax.annotate(
        " to ".join(shown[:1] + shown[1:][-1:]),
        (x, height),
        (0, sign * (6 + 8 * nth)),
        xycoords=along,
        textcoords="offset points",
        ha="center",
        va="bottom" if sign > 0 else "top",
        fontsize=6.5,
        color=color,
      )
  return keys
