"""The paper's Table 1 from shapes, without weights: parameters and bytes.

  python -m experiments.table1            (prints the page docs/table1.md)
  python -m experiments.table1 --csv

RoBERTa-base, RoBERTa-large and GPT-3, LoRA and VeRA on query and key, float32.
Where a printed number contradicts the paper's own formula, the row says so.
"""

import sys

import pandas as pd
from absl import flags

from experiments import cli
from vera_jax.report.table1 import BYTES, GIB, KIB, MIB, MODELS, table1

CSV = flags.DEFINE_bool("csv", False, "All numbers, unrounded.")

PAGE = """# The paper's Table 1, computed

Trained numbers and bytes (float32) of an adapter on query and key, counted from
the adapters' own shapes by `python -m experiments.table1`; no weights are
needed. VeRA has L (d + r) numbers, LoRA 2 L d r, over L adapted layers of width
d (section 3.2). K and M are powers of 1000 for parameters; for bytes the paper
means powers of 1024, as here. The paper's numbers are those of arXiv 2310.11454
v2; one is called a contradiction where it is off by more than one in its last
digit.

{table}

{contradictions}
"""


def main() -> None:
  table = table1()
  text = table.to_csv(index=False) if CSV.value else page(table)
  sys.stdout.write(text)


def page(table: pd.DataFrame) -> str:
  header = ["model", "r", "method", "parameters", "paper", "bytes", "paper"]
  header.append("fits the formula")
  rule = ["---", "---:", "---", *["---:"] * 4, "---"]
  rows = [header, rule, *(_cells(row) for _, row in table.iterrows())]
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  return PAGE.format(
    table="\n".join(lines), contradictions="\n".join(_contradictions(table))
  )


def _cells(row: pd.Series) -> list[str]:
  wrong = [
    word for word in ("parameters", "bytes") if row[f"{word}_contradict"]
  ]
  return [
    row["model"],
    str(row["rank"]),
    row["method"],
    f"{row['parameters']:,}",
    _number(row["paper_parameters"]),
    _size(row["bytes"]),
    _size(row["paper_bytes"]),
    f"no: {' and '.join(wrong)}" if wrong else "yes",
  ]


def _number(value: float) -> str:
  """As the paper writes it: GPT-3's in millions, the others in thousands."""
  millions = round(value) % 100_000 == 0
  return f"{value / 1e6:.1f}M" if millions else f"{value / 1e3:.1f}K"


def _size(value: float) -> str:
  for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
    if value >= unit:
      return f"{value / unit:.2f} {name}"
  return f"{value / KIB:.1f} KiB"


def _contradictions(table: pd.DataFrame) -> list[str]:
  wrong = table[table["parameters_contradict"] | table["bytes_contradict"]]
  models = {model.name: model for model in MODELS}
  lines = [f"{len(wrong)} of {len(table)} rows contradict the formula:", ""]
  for _, row in wrong.iterrows():
    model = models[row["model"]]
    layers, width, rank = 2 * model.layers, model.width, row["rank"]
    formula = f"{layers} · ({width:,} + {rank})"
    if row["method"] == "lora":
      formula = f"2 · {layers} · {width:,} · {rank}"
    lines.append(
      f"- {row['model']}, {row['method']}, r = {rank}: {formula} ="
      f" {row['parameters']:,}, printed {_number(row['paper_parameters'])};"
      f" {BYTES} bytes each are {_size(row['bytes'])}, printed"
      f" {_size(row['paper_bytes'])}."
    )
  return lines


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
