"""Figures of what was trained: d and b by layer, the delta's spectrum."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vera_jax.adapters.norms import NAME, SHORT
from vera_jax.report.style import (
  BLUE,
  DASHES,
  MARKERS,
  PALETTE,
  STYLE,
  VERMILION,
  grid,
  median_line,
  task_title,
)


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
    figure, axes = grid(len(shown), 2, width=4.4, height=2.3, title=title)
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
    median_line(ax, seeds, kinds.index(str(kind)))


def _norm_key(figure: Figure, kinds: Sequence[str]) -> None:
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
    figure, axes = grid(1, len(kinds), width=4.0, height=3.0, title=title)
    layers = sorted(values["layer"].unique())
    shades = mpl.colormaps["cividis"](np.linspace(0, 0.9, len(layers)))
    for ax, kind in zip(axes.flat, kinds, strict=True):
      here = values[(values["kind"] == kind) & (values["value"] > 0)]
      for layer, some in here.groupby("layer"):
        color = shades[layers.index(layer)]
        ax.plot(some["place"], some["value"], color=color, label=str(layer))
      ax.set_yscale("log")
      # what lies lower is rounding, of ranks that the delta hasn't
      ax.set_ylim(bottom=1e-6 * values["value"].max())
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
    figure, axes = grid(len(kinds), 2, width=4.4, height=2.2, title=title)
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
