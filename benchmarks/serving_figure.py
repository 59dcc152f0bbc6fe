"""The table and the figure of docs/serving.md, from benchmarks/serving.py.

  python -m benchmarks.serving_figure results/benchmarks/serving docs/figures

The base alone, the merged adapter and PEFT take turns with the bank in every
row. Rows were measured on two machines. So what is compared is a row's share of
the speed that its own base alone had; of the merged adapter and of PEFT it is
the median of all rows.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.serving import BASE, MERGED, PEFT
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.report.frame import method_title
from vera_jax.report.style import METHOD_COLORS, STYLE, grid, save

LAYERS = {"qv": "q and v", "all": "all linear layers"}
SIDES = {MERGED: "--", PEFT: ":"}
# The marker's filling tells VeRA's ranks apart.
FILLINGS = {64: "white", 256: "#9ccbe8", 1024: None}
Row = Mapping[str, Any]


def read(results: Path) -> list[Row]:
  """The rows of all files, in the order of the table."""
  rows = [
    {**row, "cpu": whole["cpu"]}
    for whole in map(read_json, sorted(results.glob("*.json")))
    for row in whole["rows"]
  ]
  return sorted(
    rows,
    key=lambda row: (
      [*LAYERS].index(row["layers"]),
      row["method"] != "vera",
      row["rank"],
      row["adapters"],
    ),
  )


def of_bank(row: Row) -> float:
  """Tokens per second of all 16 rows."""
  return row["tokens_per_second"][f"{row['adapters']} adapters"]


def of_side(rows: Sequence[Row], side: str) -> float | None:
  """Its share of the base's speed; None where it was not timed."""
  speeds = [row["tokens_per_second"] for row in rows]
  shares = [speed[side] / speed[BASE] for speed in speeds if side in speed]
  return statistics.median(shares) if shares else None


def markdown(results: Path) -> str:
  """Two tables: of the banks, and of what was timed beside them."""
  rows = read(results)
  header = [
    *("layers", "adapters of", "processor", "how many", "tokens/s"),
    *("of the base", "first token, s", "MB of vectors"),
  ]
  banks = [
    [
      LAYERS[row["layers"]],
      f"{method_title(row['method'])}, r = {row['rank']:,}",
      row["cpu"].replace("(R)", "").removesuffix(" Processor"),
      f"{row['adapters']:,}",
      f"{of_bank(row):.0f}",
      f"{row['of_base']:.2f}",
      f"{row['first_token_seconds']:.2f}",
      f"{row['bytes_on_device'] / 1e6:,.1f}",
    ]
    for row in rows
  ]
  sides = []
  for layers, name in LAYERS.items():
    here = [row for row in rows if row["layers"] == layers]
    heights = [of_side(here, side) for side in SIDES]
    sides.append([name, *(f"{height:.2f}" for height in heights if height)])
  return "\n\n".join(
    [
      markdown_table(header, banks, texts=3),
      markdown_table(["of the base", *SIDES], sides),
    ]
  )


def figure(rows: Sequence[Row]) -> Figure:
  """Share of the base's speed against the number of adapters, a panel per
  layers."""
  with mpl.rc_context(STYLE):
    title = "16 rows, each by another adapter"
    made, axes = grid([3.2, 3.2], width=None, least=2.6, title=title)
    for ax, (layers, name) in zip(axes, LAYERS.items(), strict=True):
      here = [row for row in rows if row["layers"] == layers]
      for kind in dict.fromkeys((row["method"], row["rank"]) for row in here):
        method, rank = kind
        line = sorted(
          (row["adapters"], row["of_base"])
          for row in here
          if (row["method"], row["rank"]) == kind
        )
        color, marker = METHOD_COLORS[method]
        ax.plot(
          *zip(*line, strict=True),
          color=color,
          marker=marker,
          markerfacecolor=FILLINGS.get(rank) or color,
          label=f"{method_title(method)}, r = {rank:,}",
        )
      for side, dashes in SIDES.items():
        height = of_side(here, side)
        if height is not None:
          ax.axhline(height, color="#555555", lw=1, ls=dashes, label=side)
      ax.set(xscale="log", xlabel="adapters in the bank", title=name)
      ax.set_ylim(bottom=0)
    axes[0].set_ylabel("speed, of the base alone")
    axes[0].legend(loc="lower left", fontsize=6.5)
  return made


def main(words: list[str]) -> None:
  if len(words) != 2:
    raise UserError("Name the folder of the results, then the figure's.")
  results, folder = map(Path, words)
  print(markdown(results))
  print(*save(figure(read(results)), folder, "serving", ["png"]))


if __name__ == "__main__":
  cli.run(main, usage=__doc__, operands=True)
