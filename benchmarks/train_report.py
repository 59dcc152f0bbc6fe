"""The table of `benchmarks.train`, from its figures."""

import statistics
from typing import Any

from benchmarks.report import load_line
from experiments.markdown import markdown_table

METHODS = {"vera": "VeRA", "lora": "LoRA", "head": "head", "full": "full"}
PARTS = ("imports", "compilation", "training")


def markdown(result: dict[str, Any]) -> str:
  """What was run, one row per trainer, and what the columns mean."""
  images = "image_size" in result
  unit = "images" if images else "tokens"
  texts = ["method", "by", "device"]
  numbers = ["seconds", "imports", "compiling", "training"]
  numbers += ["evaluation"] if images else []
  numbers += [f"{unit} per second"]
  numbers += ["with compiling", "in evaluation"] if images else []
  score = result["score_name"]
  numbers += ["peak memory", score if images else f"dev {score} by epoch"]
  ratios = {"": "all", "_in_training": "training"}
  if images:
    ratios["_with_compiling"] = "training with compiling"
    ratios["_in_evaluation"] = "evaluation"
  numbers += [f"faster, {name}" for name in ratios.values()]

  def cells(row: dict[str, Any]) -> list[str]:
    memory = f"{row['peak_bytes'] / 1e6:,.0f} MB"
    if row["device_peak_bytes"]:
      memory += f", GPU {row['device_peak_bytes'] / 1e6:,.0f} MB"
    parts = ["seconds", *PARTS, *(["evaluation"] if images else [])]
    speeds = [row[f"{unit}_a_second"]]
    if images:
      share = row["training"] / (row["training"] + row["compilation"])
      speeds += [speeds[0] * share, row["scored_a_second"]]
    digits = 1 if images else 0
    faster = [row.get(f"times_faster{what}") for what in ratios]
    return [
      METHODS[row["method"]],
      _side(row),
      row["device"],
      *(f"{row[name]:.1f}" for name in parts),
      *(f"{speed:,.{digits}f}" for speed in speeds),
      memory,
      _scores(row, images),
      *("" if times is None else f"{times:.2f}×" for times in faster),
    ]

  rows = map(cells, result["rows"])
  table = markdown_table([*texts, *numbers], rows, texts=len(texts))
  return f"# {_title(result)}\n\n{table}\n\n{_conditions(result)}\n"


def _side(row: dict[str, Any]) -> str:
  """Who trained, and on which base where that is stored in fewer bits."""
  kept = row.get("quantise", "none")
  return row["side"] if kept == "none" else f"{row['side']}, {kept} base"


def _scores(row: dict[str, Any], images: bool) -> str:
  """Of each epoch of the first run; of images each run's, and their spread."""
  if not images:
    return ", ".join(f"{score:.3f}" for score in row["scores"])
  last = [run["scores"][-1] for run in row["runs"]]
  shown = ", ".join(f"{score:.3f}" for score in last)
  if len(last) < 2:
    return shown
  return f"{statistics.mean(last):.3f} ± {statistics.stdev(last):.3f} ({shown})"


def _title(result: dict[str, Any]) -> str:
  count = result["epochs"]
  return (
    f"{result['task']}, {result['examples']:,} training examples,"
    f" {count} epoch{'s' if count > 1 else ''},"
    f" batches of {result['batch_size']}"
  )


def _conditions(result: dict[str, Any]) -> str:
  versions, rows = result["versions"], result["rows"]
  names = ("python", "jax", "flax", "transformers", "torch", "peft")
  threads = {
    r["threads"] for row in rows for r in row["runs"] if "threads" in r
  }
  repetitions = max(len(row["runs"]) for row in rows)
  lines = [
    _meaning(result),
    "",
    f"- `{result['command']}`",
    f"- {result['base']}, {_size(result)}; "
    + (
      "one run each" if repetitions == 1 else f"medians of {repetitions} runs"
    ),
    f"- {result['cpu']}, {result['cores']} cores"
    + "".join(f", {count} threads in torch" for count in sorted(threads)),
    "- " + ", ".join(f"{name} {versions[name]}" for name in names),
    load_line(result),
  ]
  losses = [
    f"{_side(row)} {METHODS[row['method']]} {row['train_loss']:.4f}"
    for row in rows
    if row.get("train_loss") is not None
  ]
  if losses:
    lines.append(f"- training loss of the last epoch: {', '.join(losses)}")
  if result["left_out"]:
    need = "torch, peft, or torch for the GPU: requirements-parity.txt"
    lines.append(f"- left out, without {need}: {', '.join(result['left_out'])}")
  return "\n".join(lines)


def _meaning(result: dict[str, Any]) -> str:
  """What the columns are."""
  if "image_size" in result:
    return (
      "Seconds of wall-clock time from the start of a process to its end, with"
      " empty caches. Compiling is what a second start of the same run saves,"
      " which finds compiled programs and prepared images in the caches."
      " Training is the rest without imports and the one evaluation at the end"
      " (reading, steps, saving). Images per second: in training, in training"
      " with compiling, in evaluation. Peak memory is the process's resident"
      " set. Faster: the other side's seconds divided by ours."
    )
  return (
    "Seconds of wall-clock time from the start of a process to the last"
    " development score, with empty caches. Compiling is what a second start of"
    " the same run saves, which finds compiled programs and tokens in the"
    " caches. Training is the rest without imports (reading, steps, one"
    " evaluation per epoch). Tokens per second are real ones, without padding,"
    " during training. Peak memory is the process's resident set. Faster: the"
    " other side's seconds divided by ours, in all and for training alone."
  )


def _size(result: dict[str, Any]) -> str:
  """What an example is, and how many there are to score."""
  if "image_size" in result:
    side, seeds = result["image_size"], sorted(set(result["seeds"]))
    return (
      f"images of {side} × {side} pixels, {result['dev_examples']:,} test"
      f" images, seeds {', '.join(map(str, seeds))}"
    )
  return (
    f"texts cut at {result['max_length']} tokens,"
    f" {result['real_tokens_an_epoch']:,} real tokens per epoch,"
    f" {result['dev_examples']:,} development examples"
  )
