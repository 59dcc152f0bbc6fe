"""The table and the plot of `benchmark train`, from its figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

METHODS = {"vera": "VeRA", "lora": "LoRA", "head": "head", "full": "full"}
COLUMNS = (
  "method",
  "by",
  "device",
  "seconds",
  "imports",
  "compiling",
  "training",
  "tokens a second",
  "peak memory",
  "dev {score} by epoch",
  "faster, all",
  "faster, training",
)
# of Okabe and Ito's colours, which the colour-blind tell apart
PARTS = {"imports": "#999999", "compilation": "#E69F00", "training": "#0072B2"}
MEMORY = "#56B4E9"


def markdown(result: dict[str, Any]) -> str:
  """What was run, a row a contender, and what the columns mean."""
  head = [name.format(score=result["score_name"]) for name in COLUMNS]
  rule = [*["---"] * 3, *["---:"] * (len(COLUMNS) - 3)]
  rows = [head, rule, *map(_cells, result["rows"])]
  table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
  return f"# {_title(result)}\n\n{table}\n\n{_conditions(result)}\n"


def _title(result: dict[str, Any]) -> str:
  count = result["epochs"]
  epochs = "1 epoch" if count == 1 else f"{count} epochs"
  return (
    f"{result['task']}, {result['examples']:,} training examples,"
    f" {epochs}, batches of {result['batch_size']}"
  )


def _cells(row: dict[str, Any]) -> list[str]:
  memory = f"{row['peak_bytes'] / 1e6:,.0f} MB"
  if row["device_peak_bytes"]:
    memory += f", GPU {row['device_peak_bytes'] / 1e6:,.0f} MB"
  return [
    METHODS[row["method"]],
    row["side"],
    row["device"],
    *(f"{row[name]:.1f}" for name in ("seconds", *PARTS)),
    f"{row['tokens_a_second']:,.0f}",
    memory,
    ", ".join(f"{score:.3f}" for score in row["scores"]),
    *(_times(row, name) for name in ("", "_in_training")),
  ]


def _times(row: dict[str, Any], what: str) -> str:
  times = row.get(f"times_faster{what}")
  return "" if times is None else f"{times:.2f}×"


def _conditions(result: dict[str, Any]) -> str:
  versions = result["versions"]
  names = ("python", "jax", "flax", "transformers", "torch", "peft")
  known = ", ".join(f"{name} {versions[name]}" for name in names)
  loads = "; ".join(
    f"{when} {', '.join(map(str, result[f'load_{when}']))}"
    for when in ("before", "after")
  )
  torch = {run["threads"] for run in _runs(result) if "threads" in run}
  counts = {len(row["runs"]) for row in result["rows"]}
  return "\n".join(
    [
      "Seconds of the wall clock from the start of a process to the last dev"
      " score, caches empty. Compiling is what a second start of the same"
      " run takes less: it finds compiled programs and tokens kept. Training is"
      " the rest without imports (reading, steps, evaluation each epoch)."
      " Tokens a second are real ones, without padding, of training. Peak"
      " memory is the process's resident set. Faster: the other side's seconds"
      " over ours, all of them and those of training alone.",
      "",
      f"- `{result['command']}`",
      f"- {result['base']}, texts cut at {result['max_length']} tokens,"
      f" {result['real_tokens_an_epoch']:,} real tokens an epoch,"
      f" {result['dev_examples']:,} dev examples; "
      + ("one run each" if counts == {1} else f"medians of {max(counts)} runs"),
      f"- {result['cpu']}, {result['cores']} cores"
      + "".join(f", {count} threads in torch" for count in sorted(torch)),
      f"- {known}",
      f"- load {loads}",
      *_left_out(result["left_out"]),
    ]
  )


def _left_out(contenders: list[str]) -> list[str]:
  if not contenders:
    return []
  need = "torch, peft, or torch for the GPU: requirements-parity.txt"
  return [f"- left out, without {need}: {', '.join(contenders)}"]


def _runs(result: dict[str, Any]) -> Iterable[dict[str, Any]]:
  return (run for row in result["rows"] for run in row["runs"])


def draw(result: dict[str, Any], path: Path) -> None:
  """Seconds, stacked by part, and peak memory: a bar a contender."""
  from matplotlib.figure import Figure

  rows = result["rows"]
  places = _places(rows)
  figure = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
  ends = [0.0] * len(rows)
  for part, colour in PARTS.items():
    widths = [row[part] for row in rows]
    label = "training and evaluation" if part == "training" else part
    left.barh(places, widths, left=ends, color=colour, label=label)
    ends = [end + width for end, width in zip(ends, widths, strict=True)]
  memory = [row["peak_bytes"] / 1e6 for row in rows]
  right.barh(places, memory, color=MEMORY)
  for place, row, size in zip(places, rows, memory, strict=True):
    left.text(row["seconds"], place, f" {_told(row)}", va="center")
    right.text(size, place, f" {size:,.0f}", va="center")
  left.set_yticks(places, [_name(row, rows) for row in rows])
  left.invert_yaxis()
  left.set_xlabel("seconds, from the start of the process to the last score")
  right.set_xlabel("peak memory, MB")
  left.margins(x=0.3)
  right.margins(x=0.25)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside upper right", ncols=len(PARTS))
  figure.suptitle(_title(result), x=0.01, ha="left")
  figure.savefig(path, dpi=120)


def _places(rows: list[dict[str, Any]]) -> list[float]:
  """One below another, with a gap where another method begins."""
  places, place = [], -1.0
  for before, row in zip([None, *rows], rows, strict=False):
    same = before is not None and before["method"] == row["method"]
    place += 1.0 if same else 1.4
    places.append(place)
  return places


def _name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
  several = len({other["device"] for other in rows}) > 1
  tail = f", {row['device']}" if several else ""
  return f"{METHODS[row['method']]}, {row['side']}{tail}"


def _told(row: dict[str, Any]) -> str:
  times = row.get("times_faster")
  faster = "" if times is None else f", {times:.1f}× as fast"
  return f"{row['seconds']:.0f} s{faster}"
