"""Figures of what was trained: d and b by layer, the delta's spectrum."""

import textwrap
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vera_jax.adapters.vector_norms import NAME, SHORT
from vera_jax.report.style import (
  BLUE,
  SEEDS,
  STYLE,
  VERMILION,
  grid,
  median_line,
  task_title,
)


def norm_figure(
  vectors: pd.DataFrame, *, title: str = "", most: int = 6
) -> Figure:
  """Norms of d and b by layer, a line per kind of layer: the paper's Figure 3.

  Args:
    vectors: from `frame.norms`; VeRA's are shown.
    title: the figure's title.
    most: conditions that are shown, those with the most layers first.
  """
  vectors = vectors[vectors["leaf"].isin(["d", "b"])]
  shown = sorted(
    vectors.groupby(["task", "condition"], sort=False),
    key=lambda group: -len(group[1][["layer", "kind"]].drop_duplicates()),
  )[:most]
  kinds = list(vectors["kind"].unique())
  with mpl.rc_context(STYLE):
    figure, axes = grid(len(shown), 2, width=4.4, height=2.3, title=title)
    lines = {}
    for row, ((task, condition), some) in zip(axes, shown, strict=True):
      for ax, leaf in zip(row, "db", strict=True):
        here = some[some["leaf"] == leaf]
        if here.empty:
          ax.text(0.5, 0.5, "not trained", transform=ax.transAxes, ha="center")
        for kind, of_kind in here.groupby("kind", sort=False):
          seeds = of_kind.groupby("layer")["norm"]
          median_line(ax, seeds, kinds.index(kind))
          lines[kind] = ax.lines[-1]
        ax.set(xlabel="layer", ylabel=rf"$\Vert {leaf} \Vert_2$")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
      name = task_title(task) + (f": {condition}" if condition else "")
      row[0].set_title("\n".join(textwrap.wrap(name, 44)), loc="left")
    keys = [kind for kind in kinds if kind in lines]
    figure.legend(
      [lines[kind] for kind in keys],
      keys,
      loc="outside lower center",
      ncols=min(4, len(keys)),
      title=SEEDS,
    )
    return figure


def spectrum_figure(values: pd.DataFrame, *, title: str = "") -> Figure:
  """Singular values of the merged delta, a line per layer, a panel per kind.

  Args:
    values: from `spectra`.
    title: the figure's title.
  """
  kinds = values["kind"].unique()
  layers = sorted(values["layer"].unique())
  with mpl.rc_context(STYLE):
    figure, axes = grid(1, len(kinds), width=4.0, height=3.0, title=title)
    shades = mpl.colormaps["cividis"](np.linspace(0, 0.9, len(layers)))
    for ax, kind in zip(axes.flat, kinds, strict=True):
      here = values[(values["kind"] == kind) & (values["value"] > 0)]
      for layer, some in here.groupby("layer"):
        color = shades[layers.index(layer)]
        ax.plot(some["place"], some["value"], color=color, label=str(layer))
      ax.set(title=kind, xlabel="place", yscale="log")
      # What lies lower is rounding: the delta's rank is smaller than its width.
      ax.set_ylim(bottom=1e-6 * values["value"].max())
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
    title: the figure's title.
  """
  by_kind: dict[str, dict[str, dict[int, np.ndarray]]] = {}
  for name, value in tensors.items():
    match = NAME.fullmatch(name)
    if match and match["leaf"][-1] in "db":
      leaves = by_kind.setdefault(match["kind"], {"d": {}, "b": {}})
      leaves[match["leaf"][-1]][int(match["layer"])] = value
  with mpl.rc_context(STYLE):
    figure, axes = grid(len(by_kind), 2, width=4.4, height=2.2, title=title)
    for row, (kind, leaves) in zip(axes, by_kind.items(), strict=True):
      for ax, (leaf, layers) in zip(row, leaves.items(), strict=True):
        if layers:
          ax.boxplot(
            list(layers.values()),
            positions=list(layers),
            whis=(2.5, 97.5),
            showfliers=False,
            medianprops={"color": VERMILION},
            boxprops={"color": BLUE},
          )
        ax.set(title=f"{leaf} of {SHORT.get(kind, kind)}", xlabel="layer")
    return figure
