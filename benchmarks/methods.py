"""The tables of docs/methods.md, made from the code and the results.

`benchmarks.docs` writes them. A method's formula of its trained numbers is
evaluated by a test and compared with what the code counts from shapes.
"""

from pathlib import Path
from typing import NamedTuple

from experiments.markdown import markdown_table
from vera_jax.adapters.methods import METHODS, adapter_named
from vera_jax.files import read_json
from vera_jax.peft_io.forms import HELD_BY
from vera_jax.report.frame import load_sweep, method_title
from vera_jax.report.summary import shown_p, summary

STUDY, TASK = Path("results/sweeps/methods"), "sst2"
COSTS = Path("results/benchmarks/cost-sst2.json")  # of benchmarks.cost
HEADER = (
  *("method", "weights of an adapted layer", "trained numbers per layer"),
  *("in PEFT", "merges", "in a bank", "score"),
)

SCORES = (
  *("task", "method", "condition", "trained numbers", "their bytes"),
  *("GFLOP per step", "median (range)"),
  *("difference from VeRA (95 %)", "p (Holm)"),
  *("difference from LoRA (95 %)", "p (Holm)"),
)


class Row(NamedTuple):
  """What the code doesn't say of a method.

  Attributes:
    weights: of an adapted layer.
    formula: trained numbers per layer, or in all: a formula of the settings, of
      i and o, the layer's widths, and of min, the smaller of these.
    source: a paper.
  """

  weights: str
  formula: str
  source: str


ROWS = {
  "vera": Row("W0 + diag(b) B diag(d) A", "r + o", "2310.11454"),
  "lora": Row("W0 + (alpha / r) B A", "r (i + o)", "2106.09685"),
  "ia3": Row("diag(l) W0, or W0 diag(l)", "o, or i", "2205.05638"),
  "dora": Row("m W / ‖W‖ of LoRA's W", "r (i + o) + o", "2402.09353"),
  "dvora": Row("m W / ‖W‖ of VeRA's W", "r + 2 o", "2402.09353"),
  "lora_fa": Row("LoRA's, A random", "r o", "2308.03303"),
  "onelora": Row("W0 + b 1ᵀ", "o", "2503.08333"),
  "pvera": Row("VeRA's; B's inputs drawn in training", "2 r + o", "2512.07703"),
  "randlora": Row(
    "W0 + (alpha / r) Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ), n = ⌈min / r⌉ terms",
    "n (r + min)",
    "2502.00987",
  ),
  "unilora": Row(
    "W0 + B A, all entries from one vector", "size, in all", "2506.00799"
  ),
  "bitfit": Row("W0; the base's biases are trained", "", "2106.10199"),
  "norms": Row(
    "W0; scales and biases of what normalises are trained", "", "2003.00152"
  ),
  "head": Row("W0; the head alone is trained", "0", ""),
  "full": Row("all weights are trained", "", ""),
}


def markdown(study: Path = STUDY) -> str:
  """The table of methods and, if the study was run, that of its scores."""
  medians: dict[str, str] = {}
  if study.is_dir():
    for scored in summary(load_sweep(study)).to_dict("records"):
      if scored["task"] == TASK:
        medians[scored["method"]] = f"{scored['score']:.1f}"
  rows = []
  for method in METHODS:
    row, adapter = ROWS[method], adapter_named(method)
    link = f" ([{row.source}](https://arxiv.org/abs/{row.source}))"
    rows.append(
      (
        f"{method_title(method)}, `{method}`" + (link if row.source else ""),
        row.weights,
        row.formula,
        " or ".join(f"`{name}`" for name in HELD_BY.get(method, ())),
        "nothing to merge" if adapter.weights is None else "yes",
        "refused" if adapter.prepare is None else "yes",
        medians.get(method, ""),
      )
    )
  parts = [markdown_table(HEADER, rows, texts=len(HEADER))]
  return "\n\n".join(parts + ([_scores(study)] if medians else []))


def _scores(study: Path) -> str:
  """Every method beside VeRA and beside LoRA, by seeds."""
  sweep = load_sweep(study)
  beside = {name: summary(sweep, against=name) for name in ("vera", "lora")}
  costs = read_json(COSTS)["methods"]
  rows = []
  for i, row in enumerate(beside["vera"].to_dict("records")):
    differences: list[str] = []
    for table in beside.values():
      one = table.iloc[i]
      if one["pairs"] > 0:
        interval = f"{one['ci_low']:+.1f} to {one['ci_high']:+.1f}"
        differences.append(f"{one['difference']:+.1f} ({interval})")
        p = one["p_holm"]  # NaN where all differences are the same
        differences.append(shown_p(p) if p == p else "")
      else:
        differences += ["", ""]
    rows.append(
      (
        row["task"],
        method_title(row["method"]),
        row["condition"],
        f"{row['adapter']:,}",
        f"{4 * (row['adapter'] + row['head']):,}",
        f"{costs[row['method']]['flops'] / 1e9:.1f}",
        f"{row['score']:.1f} ({row['low']:.1f} to {row['high']:.1f})",
        *differences,
      )
    )
  return markdown_table(SCORES, rows, texts=len(SCORES))
