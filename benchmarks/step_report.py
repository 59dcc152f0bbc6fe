"""The tables and the plot of `benchmark step`, from its figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

COLUMNS = (
  "on the network",
  "TFLOP",
  "against frozen",
  "against it, whole",
  "GB moved",
  "MB temporary",
  "MB all-reduced",
)
# of Okabe and Ito's colours, which the colour-blind tell apart
FROZEN, VERA, LORA = "#999999", "#0072B2", "#D55E00"


def tables(result: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
  """(title, cells of the rows) for each size."""
  for size, costs in result["sizes"].items():
    frozen, whole = list(costs.values())[:2]
    rows = [
      [
        name,
        f"{cost['flops'] / 1e12:.3f}",
        f"{cost['flops'] / frozen['flops']:.3f}",
        f"{cost['flops'] / whole['flops']:.3f}",
        f"{cost['moved'] / 1e9:.1f}",
        f"{cost['temporary'] / 1e6:,.0f}",
        f"{cost['sent'] / 1e6:.3f}",
      ]
      for name, cost in costs.items()
    ]
    yield f"RoBERTa-{size}, {_conditions(result, size)}", rows


def _conditions(result: dict[str, Any], size: str) -> str:
  return (
    f"{result['rows'][size]} rows of {result['length']} tokens,"
    f" {result['dtype']}, one step on {result['kind']}"
  )


def for_terminal(result: dict[str, Any]) -> Iterator[Table]:
  for title, rows in tables(result):
    table = Table(title=title)
    for place, name in enumerate(COLUMNS):
      table.add_column(name, justify="right" if place else "left")
    for row in rows:
      table.add_row(*row)
    yield table


def markdown(result: dict[str, Any]) -> str:
  """A table a size, and what the columns mean."""
  rule = ["---", *["---:"] * (len(COLUMNS) - 1)]
  parts = ["# What a step costs, as XLA compiles it"]
  for title, rows in tables(result):
    lines = [list(COLUMNS), rule, *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts.append(f"**{title}**\n\n{table}")
  versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
  parts.append(f"""\
Query and value are adapted. "frozen network" trains one number a column of the
same layers and the head: forward, and the gradient down to the lowest of them.
As all others it computes of the last layer what the head reads. "frozen
network, whole" is forward and gradient from the whole last layer down to the
embeddings; it trains the biases, which is 0.03 % of its FLOPs, and its bytes
and memory, not its FLOPs, have the head at every position. FLOPs and bytes
moved are those of two layers, unrolled, and for each further one what a third
adds; temporary memory is the scanned step's at full depth. All-reduced is what
a step sends over several chips, in float32 and once, as
[tpu_pod.md](../../docs/tpu_pod.md) has it from programs compiled for them.

- `{result["command"]}`
- {versions}""")
  return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
  """FLOPs against the frozen network's, and temporary memory: a bar a way."""
  from matplotlib.figure import Figure

  sizes = result["sizes"]
  figure = Figure(figsize=(10, 0.8 + 2.1 * len(sizes)), layout="constrained")
  panels = figure.subplots(len(sizes), 2, sharey="row", squeeze=False)
  for (left, right), (size, costs) in zip(panels, sizes.items(), strict=True):
    names, first = list(costs), next(iter(costs.values()))
    colors = [_color(name) for name in names]
    ratios = [cost["flops"] / first["flops"] for cost in costs.values()]
    memory = [cost["temporary"] / 1e6 for cost in costs.values()]
    for axes, values, form in (
      (left, ratios, " {:.3f}"),
      (right, memory, " {:,.0f}"),
    ):
      axes.barh(names, values, color=colors)
      for name, value in zip(names, values, strict=True):
        axes.text(value, name, form.format(value), va="center")
      axes.margins(x=0.18)
      axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    left.set_title(f"RoBERTa-{size}, {_conditions(result, size)}", loc="left")
    left.set_xlabel("FLOPs, the frozen network's = 1")
    right.set_xlabel("MB of temporary memory")
  figure.savefig(path, dpi=120)


def _color(name: str) -> str:
  if name.startswith("vera"):
    return VERA
  return LORA if name.startswith("lora") else FROZEN
