"""The figures of a sweep: scores, learning curves, ranks, norms.

Matplotlib without pyplot, so that nothing is global: each function returns a
`Figure`, which notebooks show and `save` writes. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; markers and dashes say the same.
"""

import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from vera_jax.analysis.frame import Sweep, history, norms
from vera_jax.data.tasks import task_named
from vera_jax.norms import NAME, SHORT

VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
PURPLE, ORANGE, SKY, BLACK = "#CC79A7", "#E69F00", "#56B4E9", "#000000"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
METHOD = {
  "vera": (BLUE, "o", "VeRA"),
  "lora": (VERMILION, "s", "LoRA"),
  "bitfit": (GREEN, "^", "BitFit"),
  "head": (BLACK, "D", "head alone"),
  "full": (PURPLE, "v", "full"),
}
METRIC = {
  "accuracy": "accuracy",
  "matthews": "Matthews correlation",
  "pearson": "Pearson correlation",
}
STYLE: dict[str, Any] = {
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.labelsize": 9,
  "legend.fontsize": 8,
  "legend.frameon": False,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.3,
  "lines.linewidth": 1.4,
  "svg.fonttype": "none",  # text stays text
  "svg.hashsalt": "vera_jax",  # the same bytes for the same figure
}
MOST = 7  # lines that one panel can tell apart
WRAP = 34  # letters of a condition's name in a line


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


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
  """As PNG and SVG."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
  with mpl.rc_context(STYLE):
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], metadata={"Date": None})
  return paths


def _grid(
  rows: int, columns: int, *, width: float, height: float, title: str
) -> tuple[Figure, np.ndarray]:
  """Panels of a size each, in inches, in a figure that makes room for text."""
  figure = Figure(
    figsize=(width * columns, height * rows + 0.3), layout="constrained"
  )
  figure.suptitle(title, fontsize=11)
  axes = figure.subplots(rows, columns, squeeze=False)
  return figure, axes


def task_title(name: str) -> str:
  """As GLUE writes it: SST-2."""
  return task_named(name).folder


def label(method: str, condition: str) -> str:
  """A condition's name in a figure, broken where it is long."""
  name = f"{METHOD[method][2]}, {condition}" if condition else METHOD[method][2]
  return "\n".join(textwrap.wrap(name, WRAP, break_long_words=False))


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
    figure, axes = _grid(
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
  from matplotlib.lines import Line2D

  plain = {"linestyle": "none", "color": BLACK}
  keys = [
    Line2D([], [], marker="o", alpha=0.6, label="a seed", **plain),
    Line2D([], [], marker="|", ms=11, mew=1.8, label="median", **plain),
  ]
  if table["collapsed"].any():
    keys.append(
      Line2D([], [], marker="o", mfc="white", label="collapsed", **plain)
    )
  if table["paper"].notna().any():
    star = {"linestyle": "none", "color": ORANGE, "mec": BLACK, "ms": 9}
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
    figure, axes = _grid(len(tasks), 2, width=4.4, height=2.9, title=title)
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
  seeds = epochs.groupby("epoch")[what]
  middle = seeds.median()
  color = PALETTE[place % len(PALETTE)]
  ax.plot(
    middle.index,
    middle,
    DASHES[place % len(DASHES)],
    color=color,
    marker=MARKERS[place % len(MARKERS)],
    ms=3.5,
    label=label(condition["method"], condition["condition"]),
  )
  ax.fill_between(
    middle.index, seeds.min(), seeds.max(), color=color, alpha=0.12, lw=0
  )


def rank_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
  """Score against trained adapter parameters: the paper's Figure 2."""
  with mpl.rc_context(STYLE):
    ranked = table[table["rank"].notna()]
    tasks = list(dict.fromkeys(ranked["task"]))
    figure, axes = _grid(1, len(tasks), width=5.4, height=3.4, title=title)
    for ax, task in zip(axes.flat, tasks, strict=True):
      here = ranked[ranked["task"] == task]
      for above, (method, some) in enumerate(
        here.groupby("method", sort=False)
      ):
        _rank_line(ax, str(method), some, above=bool(above))
      ax.set_xscale("log")
      ax.set_title(task_title(task))
      ax.set_xlabel("trained adapter parameters")
      metric = METRIC[here.iloc[0]["metric"]]
      ax.set_ylabel(f"{metric} on dev, best epoch (%)")
      ax.margins(y=0.14)
      ax.xaxis.set_major_formatter(FuncFormatter(_count))
      ax.xaxis.set_minor_locator(NullLocator())
      ax.legend(loc="best")
    return figure


def _rank_line(
  ax: Axes, method: str, rows: pd.DataFrame, *, above: bool
) -> None:
  """The seeds' range is a bar; the number at a point is its rank."""
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
  ends = rows["high"] if above else rows["low"]
  for x, y, rank in zip(rows["adapter"], ends, rows["rank"], strict=True):
    ax.annotate(
      f"{int(rank)}",
      (x, y),
      xytext=(0, 5 if above else -5),
      textcoords="offset points",
      ha="center",
      va="bottom" if above else "top",
      fontsize=7.5,
      color=color,
    )


def _count(value: float, place: int) -> str:
  del place
  for unit, name in ((1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:g}{name}"
  return f"{value:g}"


def norm_figure(
  vectors: pd.DataFrame, *, title: str = "", most: int = 6
) -> Figure:
  """Norms of d and b a layer, a line a kind of layer: the paper's Figure 3.

  Args:
    vectors: from `frame.norms`; VeRA's are shown.
    title: of the figure.
    most: conditions that are shown, those with the most layers first.
  """
  with mpl.rc_context(STYLE):
    own = vectors[vectors["leaf"].isin(["d", "b"])]
    groups = list(own.groupby(["task", "condition"], sort=False))
    wide = sorted(
      groups, key=lambda g: -len(g[1][["layer", "kind"]].drop_duplicates())
    )
    shown = wide[:most]
    kinds = list(dict.fromkeys(own["kind"]))
    figure, axes = _grid(len(shown), 2, width=4.4, height=2.3, title=title)
    for row, ((task, condition), some) in zip(axes, shown, strict=True):
      for ax, leaf in zip(row, "db", strict=True):
        _norm_lines(ax, some[some["leaf"] == leaf], kinds)
        ax.set_ylabel(rf"$\Vert {leaf} \Vert_2$")
        ax.set_xlabel("layer")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
      whose = task_title(str(task))
      name = f"{whose}: {condition}" if condition else whose
      row[0].set_title("\n".join(textwrap.wrap(name, 44)), loc="left")
    _norm_key(figure, kinds)
    return figure


def _norm_lines(ax: Axes, vectors: pd.DataFrame, kinds: Sequence[str]) -> None:
  if vectors.empty:
    ax.text(0.5, 0.5, "not trained", transform=ax.transAxes, ha="center")
  for kind, some in vectors.groupby("kind", sort=False):
    seeds = some.groupby("layer")["norm"]
    middle, place = seeds.median(), kinds.index(str(kind))
    color = PALETTE[place % len(PALETTE)]
    ax.plot(
      middle.index,
      middle,
      DASHES[place % len(DASHES)],
      color=color,
      marker=MARKERS[place % len(MARKERS)],
      ms=4,
    )
    ax.fill_between(
      middle.index, seeds.min(), seeds.max(), color=color, alpha=0.15, lw=0
    )


def _norm_key(figure: Figure, kinds: Sequence[str]) -> None:
  from matplotlib.lines import Line2D

  keys = [
    Line2D(
      [],
      [],
      color=PALETTE[i % len(PALETTE)],
      linestyle=DASHES[i % len(DASHES)],
      marker=MARKERS[i % len(MARKERS)],
      ms=4,
      label=kind,
    )
    for i, kind in enumerate(kinds)
  ]
  figure.legend(
    handles=keys, loc="outside lower center", ncols=min(4, len(keys))
  )


def spectrum_figure(values: pd.DataFrame, *, title: str = "") -> Figure:
  """Singular values of the merged delta, a line a layer, a panel a kind.

  Args:
    values: from `spectra`.
    title: of the figure.
  """
  with mpl.rc_context(STYLE):
    kinds = list(dict.fromkeys(values["kind"]))
    figure, axes = _grid(1, len(kinds), width=4.0, height=3.0, title=title)
    layers = sorted(values["layer"].unique())
    shades = mpl.colormaps["cividis"](np.linspace(0, 0.9, len(layers)))
    for ax, kind in zip(axes.flat, kinds, strict=True):
      here = values[(values["kind"] == kind) & (values["value"] > 0)]
      for layer, some in here.groupby("layer"):
        color = shades[layers.index(layer)]
        ax.plot(some["place"], some["value"], color=color, label=str(layer))
      ax.set_yscale("log")
      ax.set_title(kind)
      ax.set_xlabel("place")
    axes.flat[0].set_ylabel("singular value of the delta")
    axes.flat[-1].legend(
      title="layer", loc="upper left", bbox_to_anchor=(1.02, 1.0)
    )
    return figure


def vector_figure(
  tensors: Mapping[str, np.ndarray], *, title: str = ""
) -> Figure:
  """The entries of every layer's d and b: quartiles, and the outer 2.5 %.

  Args:
    tensors: a saved adapter's, as `load_adapter` gives them.
    title: of the figure.
  """
  found = {
    (match["kind"], match["leaf"][-1], int(match["layer"])): value
    for name, value in tensors.items()
    if (match := NAME.fullmatch(name)) and match["leaf"].startswith("vera")
  }
  kinds = list(dict.fromkeys(kind for kind, _, _ in found))
  with mpl.rc_context(STYLE):
    figure, axes = _grid(len(kinds), 2, width=4.4, height=2.2, title=title)
    for row, kind in zip(axes, kinds, strict=True):
      for ax, leaf in zip(row, "db", strict=True):
        own = {n: v for (k, x, n), v in found.items() if (k, x) == (kind, leaf)}
        if own:
          ax.boxplot(
            list(own.values()),
            positions=list(own),
            whis=(2.5, 97.5),
            showfliers=False,
            medianprops={"color": VERMILION},
            boxprops={"color": BLUE},
          )
        ax.set_title(f"{leaf} of {SHORT.get(kind, kind)}")
        ax.set_xlabel("layer")
    return figure
