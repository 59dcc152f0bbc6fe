"""The tables of docs/methods.md, made from the code and the results.

`benchmarks.docs` writes them.
"""

from pathlib import Path

from experiments.markdown import markdown_table
from vera_jax.adapters.method import IN_CONFIG
from vera_jax.adapters.methods import METHODS
from vera_jax.files import read_json
from vera_jax.peft_io.forms import HELD_BY
from vera_jax.report.frame import load_sweep, method_title
from vera_jax.report.summary import shown, shown_p, summary

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


def markdown(study: Path = STUDY) -> str:
  """The table of methods and, if the study was run, that of its scores."""
  medians: dict[str, str] = {}
  if study.is_dir():
    for scored in summary(load_sweep(study)).to_dict("records"):
      if scored["task"] == TASK:
        medians[scored["method"]] = f"{scored['score']:.1f}"
  rows = []
  for method, line in METHODS.items():
    adapter = line()
    link = f" ([{line.paper}](https://arxiv.org/abs/{line.paper}))"
    rows.append(
      (
        f"{line.title}, `{method}`" + (link if line.paper else ""),
        line.weights,
        line.trained,
        " or ".join(f"`{name}`" for name in HELD_BY.get(method, ())),
        "nothing to merge" if adapter.weights is None else "yes",
        "refused" if adapter.prepare is None else "yes",
        medians.get(method, ""),
      )
    )
  parts = [markdown_table(HEADER, rows, texts=len(HEADER))]
  return "\n\n".join(parts + ([_scores(study)] if medians else []))


def settings() -> str:
  """What the groups of configs may have, and the table of all settings."""
  rows = []
  for line in METHODS.values():
    for name, default, text in line.described():
      if line.group == line.name:
        value = "" if default is None else f"`{default}`".replace("|", r"\|")
        meaning = "" if name in IN_CONFIG else text.replace("|", r"\|")
        rows.append((f"`{line.name}.{name}`", value, meaning))
  of_all = "\n".join(f"- `{name}`: {text}" for name, text in IN_CONFIG.items())
  header = ("setting", "default", "what it is")
  return f"{of_all}\n\n{markdown_table(header, rows, texts=len(header))}"


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
      interval = one["ci_low"], one["ci_high"]
      differences.append(shown(one["difference"], *interval, "+.1f"))
      differences.append(shown_p(one["p_holm"]))
    rows.append(
      (
        row["task"],
        method_title(row["method"]),
        row["condition"],
        f"{row['adapter']:,}",
        f"{4 * (row['adapter'] + row['head']):,}",
        f"{costs[row['method']]['flops'] / 1e9:.1f}",
        shown(row["score"], row["low"], row["high"]),
        *differences,
      )
    )
  return markdown_table(SCORES, rows, texts=len(SCORES))
