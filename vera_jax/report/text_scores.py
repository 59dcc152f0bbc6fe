"""Scores of the texts that runs wrote for their test inputs, where they did.

A result has them by name in `test.scores`. With a row per run and metric they
are a sweep again, of which `summary` and the figures say what they say of any.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd

from vera_jax.report.frame import BASELINE, FORGETTING, Sweep
from vera_jax.report.summary import shown, shown_p, summary

PERCENT = ("BLEU", "METEOR", "ROUGE_L")  # shares, which papers print so
CONDITION = ["task", "method", "condition"]


def text_scores(sweep: Sweep) -> Sweep | None:
  """The sweep with a row per run and test metric. Without any it is None.

  What a run has forgotten of general texts is one of them.

  Its runs' `score` and `last` are the metric's value, in percent for a share;
  no such row shows a sign of failure.
  """
  rows = []
  for _, run in sweep.runs.iterrows():
    result = run["result"]
    scores = dict(result.get("test", {}).get("scores", {}))
    if FORGETTING in result.get("general", {}):
      scores[FORGETTING] = result["general"][FORGETTING]
    for name, value in scores.items():
      score = 100 * value if is_share(name) else value
      scored = {"metric": name, "score": score, "last": score}
      rows.append(
        run.to_dict() | scored | {"collapsed": False, "signatures": []}
      )
  return sweep._replace(runs=pd.DataFrame(rows)) if rows else None


def is_share(metric: str) -> bool:
  """Whether papers print a metric in percent."""
  return metric in PERCENT or "accuracy" in metric


def text_tables(texts: Sweep) -> dict[str, pd.DataFrame]:
  """Scores, and differences from LoRA where there are some, by their titles.

  Args:
    texts: from `text_scores`.

  Returns:
    Cells of text with a row per condition and a column per metric.
  """
  table = summary(texts)

  def score(row: Any) -> str:
    digits, several = _digits(row.metric), row.seeds > 1
    return shown(row.score, row.low, row.high, digits, several=several)

  def difference(row: Any) -> str:
    digits, p = f"+{_digits(row.metric)}", shown_p(row.p_holm)
    text = shown(row.difference, row.ci_low, row.ci_high, digits)
    if p:
      text += f", p {p}" if p.startswith("<") else f", p = {p}"
    return text

  scores = _by_metric(table, score)
  sizes = table.drop_duplicates(CONDITION)
  scores.insert(3, "adapter parameters", [f"{n:,}" for n in sizes["adapter"]])
  scores["seeds"] = [str(n) for n in sizes["seeds"]]
  differences = _by_metric(table, difference)
  compared = (differences.drop(columns=CONDITION) != "").any(axis=1)
  tables = {
    "Test texts": scores,
    "Test texts, difference from LoRA (95 % interval)": differences[compared],
  }
  return {title: some for title, some in tables.items() if len(some)}


def text_notes(texts: Sweep) -> list[str]:
  """What stands below these tables, one sentence each."""
  tests = [x["test"] for x in texts.runs["result"] if "test" in x]
  inputs = " or ".join(str(n) for n in sorted({x["inputs"] for x in tests}))
  missing = {x["missing"] for x in tests} - {""}
  lines = []
  if tests:
    lines.append(
      f"Texts for {inputs} test inputs, by the model that the run ended with:"
      " the median over the seeds, with the lowest and the highest. BLEU,"
      " METEOR and ROUGE_L are in percent."
    )
  if any("accuracy" in name for name in texts.runs["metric"]):
    lines[0] += " Accuracies are as well."
  if (texts.runs["metric"] == FORGETTING).any():
    lines.append(
      f"{FORGETTING}: by how much the loss of general texts is higher after"
      " training than before it, in nats per token; lower is better."
    )
  if (texts.runs["method"] == BASELINE).any():
    lines.append(
      "Differences are made as those of the scores above; p is adjusted for the"
      " number of comparisons of all metrics together."
    )
  return lines + sorted(missing)


def _by_metric(table: pd.DataFrame, cell: Callable[[Any], str]) -> pd.DataFrame:
  """A row per condition, and a column of cells for each metric."""
  rows = [
    dict(zip(CONDITION, key, strict=True))
    | {row.metric: cell(row) for row in some.itertuples()}
    for key, some in table.groupby(CONDITION, sort=False)
  ]
  cells = pd.DataFrame(rows).fillna("")
  return cells.assign(condition=cells["condition"].str.replace("|", r"\|"))


def _digits(metric: str) -> str:
  if metric == FORGETTING:
    return ".3f"
  return ".1f" if is_share(metric) else ".2f"
