"""How figures look, the same for all.

Matplotlib without pyplot, so that nothing is global: each function returns a
`Figure`, which notebooks show and `save` writes. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; markers and dashes say the same.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.core.groupby import SeriesGroupBy

from vera_jax.errors import UserError
from vera_jax.report.frame import method_title
from vera_jax.tasks.task import task_named

VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
PURPLE, ORANGE, SKY, BLACK = "#CC79A7", "#E69F00", "#56B4E9", "#000000"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Any = ("-", "--", "-.", ":")
# A method's colour is the same in all figures; others than these share one.
METHOD_COLORS = {
  "vera": (BLUE, "o"),
  "lora": (VERMILION, "s"),
  "ia3": (ORANGE, "p"),
  "dora": (VERMILION, "X"),
  "dvora": (BLUE, "X"),
  "pvera": (BLUE, "v"),
  "onelora": (BLUE, "P"),
  "lora_fa": (VERMILION, "v"),
  "randlora": (VERMILION, "D"),
  "unilora": (VERMILION, "P"),
  "bitfit": (GREEN, "^"),
  "norms": (GREEN, "D"),
  "head": (BLACK, "D"),
  "full": (PURPLE, "v"),
}
OTHER = (SKY, "P")
# These share the colour of the method that they vary, and have broken lines.
VARIANTS = (
  *("dora", "dvora", "pvera", "onelora"),
  *("lora_fa", "randlora", "unilora", "norms"),
)
SEEDS = "median and range of the seeds"  # what a line and its band are
# Of tasks that are known by their data: images:NAME is "images in NAME".
KINDS = {
  "e2e": "E2E",
  "e2e_texts": "E2E's texts",
  "images": "images",
  "instruct": "instructions",
  "language": "texts",
  "text": "texts",
}
METRIC = {
  "accuracy": "accuracy",
  "micro_f1": "micro F1",
  "entity_f1": "entity F1",
  "accuracy_f1": "mean of accuracy and F1",
  "matthews": "Matthews correlation",
  "pearson": "Pearson correlation",
  "token_probability": "token probability",
  "BLEU": "BLEU (%)",
  "NIST_perl": "NIST by the Perl script's rule",
  "METEOR": "METEOR (%)",
  "ROUGE_L": "ROUGE-L (%)",
}
STYLE: Any = {
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
FORMATS: Any = {"png": {"dpi": 200}, "svg": {"metadata": {"Date": None}}}
WRAP = 34  # letters of a condition's name per line


def save(
  figure: Figure,
  folder: Path,
  name: str,
  kinds: Sequence[str] = tuple(FORMATS),
) -> list[Path]:
  """Writes the figure as PNG and SVG, or as `kinds` of them."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f"{name}.{kind}" for kind in kinds]
  with mpl.rc_context(STYLE):
    for kind, path in zip(kinds, paths, strict=True):
      figure.savefig(path, **FORMATS[kind])
  return paths


def grid(
  rows: int, columns: int, *, width: float, height: float, title: str
) -> tuple[Figure, np.ndarray]:
  """Panels of equal size, in inches, in a figure that makes room for text."""
  figure = Figure(
    figsize=(width * columns, height * rows + 0.3), layout="constrained"
  )
  figure.suptitle(title, fontsize=11)
  axes = figure.subplots(rows, columns, squeeze=False)
  return figure, axes


def task_title(name: str) -> str:
  """A task as its benchmark writes it (SST-2), or its kind and its data."""
  try:
    return task_named(name).presentation.title or name
  except UserError:
    kind, _, data = name.partition(":")
    title = KINDS.get(kind, kind)
    return f"{title} in {data}" if data else title


def metric_title(name: str) -> str:
  return METRIC.get(name, name)


def label(method: str, condition: str) -> str:
  """A condition's name in a figure, broken where it is long."""
  name = method_title(method)
  name = f"{name}, {condition}" if condition else name
  return "\n".join(textwrap.wrap(name, WRAP, break_long_words=False))


def median_line(
  ax: Axes, seeds: SeriesGroupBy, number: int, *, label: str | None = None
) -> None:
  """The median over the seeds, and a band from the lowest to the highest.

  `place` is the line's among those of its axes: its colour, dashes, marker.
  """
  middle, color = seeds.median(), PALETTE[number % len(PALETTE)]
  ax.plot(
    middle.index,
    middle,
    DASHES[number % len(DASHES)],
    color=color,
    marker=MARKERS[number % len(MARKERS)],
    ms=3.5,
    label=label,
  )
  ax.fill_between(
    middle.index, seeds.min(), seeds.max(), color=color, alpha=0.12, lw=0
  )
