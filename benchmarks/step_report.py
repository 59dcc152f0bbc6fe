"""The tables and the plot of `benchmarks.step`, from its figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from experiments.markdown import markdown_table

COLUMNS = (
  "on the network",
  "TFLOP",
  "against frozen",
  "against it, whole",
  "GB moved",
  "MB temporary",
  "MB all-reduced",
)
# Okabe and Ito's, which colour-blind readers can tell apart, by the first word
COLORS, GREY = {"vera": "#0072B2", "lora": "#D55E00"}, "#999999"


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
  columns = [Column(name, justify="right") for name in COLUMNS[1:]]
  for title, rows in tables(result):
    table = Table(COLUMNS[0], *columns, title=title)
    for row in rows:
      table.add_row(*row)
    yield table


def markdown(result: dict[str, Any]) -> str:
  """One table per size, and what the columns mean."""
  parts = ["# What a step costs, as XLA compiles it"]
  for title, rows in tables(result):
    parts.append(f"**{title}**\n\n{markdown_table(COLUMNS, rows)}")
  versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
  parts.append(f"""\
Query and value are adapted. "frozen network" trains one number per output of
the same layers and the head: it takes the forward pass, and the gradient down
to the lowest of these layers. Like all others it computes of the last layer
what the head reads. "frozen network, whole" is forward and gradient from the
whole last layer down to the embeddings. It trains the biases, which is 0.03 %
of its FLOPs; its bytes and memory, but not its FLOPs, include the head at every
position. FLOPs and bytes moved are those of two layers, unrolled, and for each
further one what a third layer adds; temporary memory is the scanned step's at
full depth. "MB all-reduced" is what a step sends between several chips, in
float32 and once, as [tpu_pod.md](../../docs/tpu_pod.md) has it from programs
compiled for them.

- `{result["command"]}`
- {versions}""")
  return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
  """FLOPs against the frozen network's, and temporary memory: bars."""
  from matplotlib.figure import Figure

  sizes = result["sizes"]
  figure = Figure(figsize=(10, 0.8 + 2.1 * len(sizes)), layout="constrained")
  panels = figure.subplots(len(sizes), 2, sharey="row", squeeze=False)
  for (left, right), (size, costs) in zip(panels, sizes.items(), strict=True):
    names, first = list(costs), next(iter(costs.values()))
    colors = [COLORS.get(name.split()[0], GREY) for name in names]
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
