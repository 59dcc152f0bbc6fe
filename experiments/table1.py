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
from vera_jax.report.table1 import BYTES, MODELS, UNITS, table1

CSV = flags.DEFINE_bool("csv", False, "All numbers, unrounded.")

PAGE = """# The paper's Table 1, computed

For those who check the paper's counts.

Trained parameters and their bytes (float32) of an adapter on query and key,
counted from the adapters' own shapes by `vera-jax table1`; no
weights are needed. VeRA has L (d + r) parameters, LoRA 2 L d r, over L adapted
layers of width d (section 3.2). K and M are powers of 1000 for parameters; for
bytes the paper means powers of 1024, as here. The paper's numbers are those of
arXiv 2310.11454 v2. A number contradicts the formula where it is off by more
than one in its last digit.

| model | r | method | parameters | paper | bytes | paper | fits the formula |
| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |
{rows}

{contradictions}
"""


def main() -> None:
  table = table1()
  text = table.to_csv(index=False) if CSV.value else page(table)
  sys.stdout.write(text)


def page(table: pd.DataFrame) -> str:
  """The Markdown page of a `table1`."""
  rows, contradictions = [], []
  for row in table.itertuples():
    wrong = ["parameters"] if row.parameters_contradict else []
    wrong += ["bytes"] if row.bytes_contradict else []
    unit = row.printed_bytes.split()[1]  # the paper's unit for ours too
    decimals = 1 if unit == "KiB" else 2
    size = f"{row.bytes / UNITS[unit]:.{decimals}f} {unit}"
    fits = f"no: {' and '.join(wrong)}" if wrong else "yes"
    rows.append(
      f"| {row.model} | {row.rank} | {row.method} | {row.parameters:,} |"
      f" {row.printed_parameters} | {size} | {row.printed_bytes} | {fits} |"
    )
    if wrong:
      layers, width = MODELS[row.model]
      formula = f"{2 * layers} · ({width:,} + {row.rank})"
      if row.method == "lora":
        formula = f"2 · {2 * layers} · {width:,} · {row.rank}"
      contradictions.append(
        f"- {row.model}, {row.method}, r = {row.rank}: {formula} ="
        f" {row.parameters:,}, printed {row.printed_parameters}; {BYTES} bytes"
        f" each are {size}, printed {row.printed_bytes}."
      )
  return PAGE.format(
    rows="\n".join(rows),
    contradictions="\n".join(
      [
        f"{len(contradictions)} of {len(table)} rows contradict the formula:",
        "",
        *contradictions,
      ]
    ),
  )


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
