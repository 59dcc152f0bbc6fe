"""How figures look, the same for all: colours, sizes, words, formats.

Matplotlib without pyplot, so that nothing is global: each function returns a
`Figure`, which notebooks show and `save` writes. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; markers, dashes and fillings say the
same in grey. Text has the size in which it is printed, so a figure is drawn in
the width of its place on the page, and not scaled down.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pandas.core.groupby import SeriesGroupBy

from vera_jax.errors import UserError
from vera_jax.report.frame import method_title
from vera_jax.report.words import words

VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
PURPLE, ORANGE, SKY, BLACK = "#CC79A7", "#E69F00", "#56B4E9", "#000000"
DASHES: Any = ("-", "--", "-.", ":")
# A method's colour and marker are the same in all figures, and in grey the
# marker alone tells it; methods that are missing here share one.
METHOD_COLORS = {
  "vera": (BLUE, "o"),
  "lora": (VERMILION, "s"),
  "ia3": (ORANGE, "p"),
  "dora": (VERMILION, "<"),
  "dvora": (BLUE, "X"),
  "pvera": (BLUE, "v"),
  "onelora": (BLUE, "P"),
  "lora_fa": (VERMILION, ">"),
  "lora_xs": (VERMILION, "H"),
  "randlora": (VERMILION, "d"),
  "unilora": (VERMILION, "h"),
  "tied_lora": (BLUE, "*"),
  "bitfit": (GREEN, "^"),
  "norms": (GREEN, "D"),
  "head": (BLACK, "D"),
  "ridge": (BLACK, "s"),
  "full": (PURPLE, "v"),
}
OTHER = (SKY, "P")
# These share the colour of the method that they vary, and have broken lines.
VARIANTS = (
  *("dora", "dvora", "pvera", "onelora", "tied_lora"),
  *("lora_fa", "lora_xs", "randlora", "unilora", "norms"),
)
SEEDS = "median and range of the seeds"  # what a line and its band are
STYLE: Any = {
  "font.size": 8,
  "axes.titlesize": 8.5,
  "axes.labelsize": 8,
  "xtick.labelsize": 7.5,
  "ytick.labelsize": 7.5,
  "legend.fontsize": 7.5,
  "legend.title_fontsize": 7.5,
  "legend.frameon": False,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.3,
  "lines.linewidth": 1.2,
  "lines.markersize": 4.5,
  "pdf.fonttype": 42,  # fonts that journals take
  "svg.fonttype": "none",  # text stays text
  "svg.hashsalt": "vera_jax",  # the same bytes for the same figure
}
FORMATS: Any = {
  "png": {"dpi": 200},
  "svg": {"metadata": {"Date": None}},
  "pdf": {"metadata": {"CreationDate": None}},
}
COLUMN, TEXT = 3.25, 6.75  # inches, of a page in two columns
UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}
LETTER = 0.062  # inches of a letter at most, on average
LINE = 0.19  # inches, of a row of a score figure


def width_of(text: str) -> float:
  """Inches of "column", "text", or of a number with its unit, as "8.5cm".

  Raises:
    UserError: it is none of these, or no width of a page.
  """
  if text in ("column", "text"):
    return COLUMN if text == "column" else TEXT
  match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(in|cm|mm|pt)", text)
  inches = float(match[1]) * UNITS[match[2]] if match else 0.0
  if not 2 <= inches <= 40:
    raise UserError(
      f"{text!r} is no figure's width: column ({COLUMN}in), text ({TEXT}in),"
      " or 2in to 40in as 3.25in, 8.5cm, 85mm or 240pt."
    )
  return inches


def save(
  figure: Figure,
  folder: Path,
  name: str,
  kinds: Sequence[str] = tuple(FORMATS),
) -> list[Path]:
  """Writes the figure as PNG, SVG and PDF, or as `kinds` of them."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f"{name}.{kind}" for kind in kinds]
  with mpl.rc_context(STYLE):
    for kind, path in zip(kinds, paths, strict=True):
      figure.savefig(path, **FORMATS[kind])
  return paths


def grid(
  heights: Sequence[float],
  *,
  width: float | None,
  least: float,
  most: int = 3,
  title: str = "",
) -> tuple[Figure, list[Axes]]:
  """Panels, as many beside each other as have room.

  Args:
    heights: inches of each panel; a row has that of its highest.
    width: of the figure, in inches. None: that of a page's text.
    least: inches that a panel needs from left to right.
    most: panels beside each other.
    title: the figure's. With a width there is none, for a figure in a paper
      has its caption.
  """
  count = len(heights)
  columns = beside(count, width, least=least, most=most)
  rows = [max(heights[i : i + columns]) for i in range(0, count, columns)]
  height = sum(rows) + 0.3
  figure = Figure(figsize=(width or TEXT, height), layout="constrained")
  if title and width is None:
    figure.suptitle(title, fontsize=9.5)
  axes = figure.subplots(
    len(rows), columns, squeeze=False, height_ratios=rows
  ).ravel()
  for ax in axes[count:]:
    ax.set_visible(False)
  return figure, list(axes[:count])


def beside(
  panels: int, width: float | None, *, least: float, most: int = 3
) -> int:
  """How many panels stand beside each other in a figure of this width."""
  return max(1, min(panels, most, int((width or TEXT) / least)))


def legend(
  figure: Figure, *, keys: Sequence[Any] = (), title: str | None = None
) -> None:
  """A legend below the panels: what they name, and more `keys`."""
  named: dict[str, Any] = {}
  for ax in figure.axes:
    for key, name in zip(*ax.get_legend_handles_labels(), strict=True):
      named.setdefault(name, key)
  named |= {str(key.get_label()): key for key in keys}
  if not named:
    return
  longest = max(len(line) for name in named for line in name.splitlines())
  room = figure.get_figwidth() / (0.9 * LETTER * longest + 0.45)
  columns = max(1, min(len(named), int(room)))
  rows = -(-len(named) // columns) + bool(title)
  # the panels keep their height
  figure.set_figheight(figure.get_figheight() + 0.16 * rows)
  figure.legend(
    named.values(),
    named.keys(),
    loc="outside lower center",
    ncols=columns,
    title=title,
  )


def look(method: str) -> tuple[str, str]:
  """A method's colour and marker; a chain's are its first and second's."""
  first, *others = method.split("+")
  color, marker = METHOD_COLORS.get(first, OTHER)
  return (color, METHOD_COLORS.get(others[0], OTHER)[1] if others else marker)


def looks(methods: Sequence[str]) -> list[dict[str, Any]]:
  """How lines of these methods are drawn.

  Several of one method share its colour and marker, and differ in shade, dashes
  and filling.
  """
  lines = []
  for number, method in enumerate(methods):
    color, marker = look(method)
    nth, count = methods[:number].count(method), methods.count(method)
    white = 0.6 * nth / count
    shade = tuple((1 - white) * part + white for part in to_rgb(color))
    broken = int(method.split("+")[0] in VARIANTS)
    lines.append(
      {
        "color": shade,
        "marker": marker,
        "mfc": "white" if nth % 2 else shade,
        "linestyle": DASHES[(nth + broken) % len(DASHES)],
      }
    )
  return lines


def vector_looks(count: int) -> list[dict[str, Any]]:
  """Of lines of d and b, which are VeRA's."""
  return looks(["vera"] * count)


def inside(values: np.ndarray, regular: np.ndarray) -> tuple[float, float]:
  """The range of an axis: of all values, or without outliers.

  Those lie beyond a gap that is more than twice as long as the range of all
  other values, so that most of the axis would be empty. At least three of five
  regular values are kept.

  Args:
    values: what is drawn.
    regular: those of runs that did not fail; of no account where these are
      fewer than the others.
  """
  regular = regular if 2 * len(regular) >= len(values) else values
  values, fewest = np.sort(values), 0.6 * len(regular)
  for sign in (1, -1):  # too low, too high
    values = sign * values[::sign]
    for first in range(len(values) - 1, 0, -1):
      kept = values[first:]
      gap, extent = kept[0] - values[first - 1], kept[-1] - kept[0]
      enough = (sign * regular >= kept[0]).sum() >= max(1, fewest)
      if enough and gap > 2 * max(extent, 0.02 * abs(kept[-1])) and extent:
        values = kept
        break
    values = sign * values[::sign]
  return values[0], values[-1]


def label(method: str, condition: str, *, letters: int = 34) -> str:
  """A condition's name in a figure, broken where it is long."""
  name = method_title(method)
  name = f"{name}, {words(condition)}" if condition else name
  return "\n".join(textwrap.wrap(name, letters, break_long_words=False))


def median_line(
  ax: Axes, seeds: SeriesGroupBy, *, label: str | None = None, **line: Any
) -> None:
  """The median over the seeds, and a band from the lowest to the highest.

  Args:
    ax: the panel.
    seeds: of each point of the line.
    label: in the legend.
    **line: how it is drawn, from `looks`.
  """
  middle = seeds.median()
  # no markers that hide the line
  line |= {"ms": 3.5, "markevery": max(1, len(middle) // 12)}
  ax.plot(middle.index, middle, label=label, **line)
  ax.fill_between(
    middle.index,
    seeds.min(),
    seeds.max(),
    color=line["color"],
    alpha=0.15,
    lw=0,
  )
