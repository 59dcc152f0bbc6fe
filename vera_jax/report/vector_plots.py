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
  BLACK,
  BLUE,
  SEEDS,
  STYLE,
  grid,
  legend,
  median_line,
  vector_looks,
)
from vera_jax.report.words import task_title, words


def norm_figure(
  vectors: pd.DataFrame,
  *,
  title: str = "",
  width: float | None = None,
  most: int = 6,
) -> Figure:
  """Norms of d and b by layer, a line per kind of layer: the paper's Figure 3.

  Args:
    vectors: from `frame.norms`; VeRA's are shown, in its colour.
    title: the figure's title.
    width: of the figure, in inches.
    most: conditions that are shown, those with the most layers first.
  """
  vectors = vectors[vectors["leaf"].isin(["d", "b"])]
  shown = sorted(
    vectors.groupby(["task", "condition"], sort=False),
    key=lambda group: -len(group[1][["layer", "kind"]].drop_duplicates()),
  )[:most]
  kinds = list(vectors["kind"].unique())
  lines = dict(zip(kinds, vector_looks(len(kinds)), strict=True))
  with mpl.rc_context(STYLE):
    figure, axes = grid(
      [1.9] * 2 * len(shown), width=width, least=2.6, most=2, title=title
    )
    panels = iter(axes)
    for (task, condition), some in shown:
      name = task_title(task) + (f": {words(condition)}" if condition else "")
      for leaf in "db":
        ax, here = next(panels), some[some["leaf"] == leaf]
        if here.empty:
          ax.text(0.5, 0.5, "not trained", transform=ax.transAxes, ha="center")
        for kind, of_kind in here.groupby("kind", sort=False):
          seeds = of_kind.groupby("layer")["norm"]
          median_line(ax, seeds, label=str(kind), **lines[kind])
        ax.set(xlabel="layer", ylabel=rf"$\Vert {leaf} \Vert_2$")
        ax.set_title("\n".join(textwrap.wrap(name, 44)))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, title=SEEDS)
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
    figure, axes = grid([2.4] * len(kinds), width=None, least=2.6, title=title)
    shades = mpl.colormaps["cividis"](np.linspace(0, 0.9, len(layers)))
    for ax, kind in zip(axes, kinds, strict=True):
      here = values[(values["kind"] == kind) & (values["value"] > 0)]
      for layer, some in here.groupby("layer"):
        color = shades[layers.index(layer)]
        ax.plot(some["place"], some["value"], color=color, label=str(layer))
      ax.set(title=kind, xlabel="place", yscale="log")
      # What lies lower is rounding: the delta's rank is smaller than its width.
      ax.set_ylim(bottom=1e-6 * values["value"].max())
    axes[0].set_ylabel("singular value of the delta")
    legend(figure, title="layer")
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
    figure, axes = grid(
      [1.8] * 2 * len(by_kind), width=None, least=2.6, most=2, title=title
    )
    panels = iter(axes)
    for kind, leaves in by_kind.items():
      for leaf, layers in leaves.items():
        ax = next(panels)
        if layers:
          ax.boxplot(
            list(layers.values()),
            positions=list(layers),
            whis=(2.5, 97.5),
            showfliers=False,
            medianprops={"color": BLACK},
            boxprops={"color": BLUE},
          )
        ax.set(title=f"{leaf} of {SHORT.get(kind, kind)}", xlabel="layer")
    return figure
