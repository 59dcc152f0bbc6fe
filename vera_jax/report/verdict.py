"""A folder's runs against the paper, cell by cell.

A cell is *within* when our median or mean differs from the paper's by at most

  t sqrt(c (p^2 / m + s^2 / n)) + half of one in the last printed digit,

the 95 % interval of a difference between m runs with the paper's spread p and n
with ours, s: t is Student's 97.5 % quantile for the smaller group's freedom,
and c is pi / 2 for medians, 1 for means. Where one side has no spread, it is
taken to have the other's; where neither has, there is no verdict. Of an average
of numbers the interval is that of a mean of independent ones. A printed
number of parameters *contradicts its own formula* where the paper's formula
gives one that is further off than one in its last digit; ours is within when it
is the formula's.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict
from scipy import stats

from vera_jax.errors import UserError
from vera_jax.files import BLANK, DATA, json_lines, open_file, read_lines
from vera_jax.report.frame import Sweep, settings_of
from vera_jax.report.published import Cell, belongs, cells
from vera_jax.report.text_scores import is_share

WITHIN, ABOVE, BELOW, MISSING = "within", "above", "below", "missing"
CONTRADICTS = "contradicts its own formula"
VERDICTS = (WITHIN, ABOVE, BELOW, MISSING, CONTRADICTS)
# Questions of FastChat's two sets, by number.
JUDGED = {"vicuna": range(1, 81), "mt_bench": range(81, 161)}

Judgments = Mapping[tuple[str, str], Sequence[float]]
Planned = Callable[[str], Iterable[Mapping[str, Any]]]


def read_judgments(file: Path, turn: int) -> dict[tuple[str, str], list[float]]:
  """Scores of one turn, by (model's name, set of questions).

  Args:
    file: as FastChat's gen_judgment writes it, a JSON object in each line.
    turn: the one, from 1.

  Raises:
    UserError: a line is no judgment.
  """
  scores: dict[tuple[str, str], list[float]] = {}
  with open_file(file, inside=None, limit=DATA) as opened:
    for number, one, wrong in json_lines(read_lines(opened, name=file)):
      if wrong == BLANK:
        continue
      try:
        question, judged = int(one["question_id"]), int(one["turn"])
        model, score = str(one["model"]), float(one["score"])
      except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
          f"{file}:{number} is no judgment of FastChat's"
          f"{f' ({wrong})' if wrong else ''}: it needs question_id, model, turn"
          " and score."
        ) from error
      # a score of -1 is a judgment without one
      if judged == turn and score >= 0:
        for name, questions in JUDGED.items():
          if question in questions:
            scores.setdefault((model, name), []).append(score)
  return scores


def verdicts(
  sweep: Sweep,
  planned: Planned,
  *,
  epochs: Mapping[str, str],
  judgments: Judgments | None = None,
) -> pd.DataFrame:
  """One row per cell of each table of the paper that the sweep has runs for.

  Args:
    sweep: our runs.
    planned: the configs of the runs that a table or figure is made of here, of
      which differences in settings are listed.
    epochs: by table, whether the "best" or the "last" epoch of a run counts,
      where the paper doesn't say.
    judgments: from `read_judgments`.

  Returns:
    table, row, column, paper, paper_spread, ours, runs, tolerance, verdict,
    differences (sentences), note. `ours` is in the paper's unit.
  """
  flat = [flatten_dict(x["config"], sep=".") for x in sweep.runs["result"]]

  def of(run: Mapping[str, Any] | None) -> pd.DataFrame:
    chosen = [
      run is not None and belongs(one, run, model=sweep.paper) for one in flat
    ]
    return sweep.runs[chosen]

  pairs = [(cell, of(cell.run), of(cell.against)) for cell in cells()]
  tables = {
    cell.table
    for cell, runs, others in pairs
    if len(runs) and (cell.against is None or len(others))
  }
  if judgments:  # then of tables that a judge fills those which it has seen
    seen = {questions for _, questions in judgments}
    tables -= {
      cell.table for cell in cells() if cell.measure in {*JUDGED} - seen
    }
  rows: list[dict[str, Any]] = []
  for cell, runs, others in pairs:
    if cell.table not in tables:
      continue
    if cell.measure == "best":
      cell = cell._replace(measure=epochs.get(cell.table, "best"))
    if cell.measure == "average":
      ours, allowed, verdict, reason = _judge_average(cell, rows)
    else:
      values = _values(cell, runs, others, judgments or {})
      ours, allowed, verdict, reason = _judge(cell, values)
    rows.append(
      {
        "table": cell.table,
        "row": cell.row,
        "column": cell.column,
        "paper": cell.printed,
        "paper_spread": cell.spread,
        "ours": ours,
        "runs": len(runs),
        "tolerance": allowed,
        "verdict": verdict,
        "differences": _differences(cell, runs, planned(cell.table)),
        "note": "; ".join(text for text in (reason, cell.note) if text),
      }
    )
  return pd.DataFrame(rows)


def _values(
  cell: Cell, runs: pd.DataFrame, others: pd.DataFrame, judgments: Judgments
) -> list[float]:
  """What the runs gave: one number per run, or per question of a judge."""
  if cell.measure in JUDGED:
    names = [folder.name for folder in runs["folder"] if folder]
    return [x for n in names for x in judgments.get((n, cell.measure), ())]
  ours = _by_seed(cell.measure, runs)
  if cell.against is None:
    return list(ours.values())
  theirs = _by_seed(cell.measure, others)
  pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
  if cell.by == "difference":
    return [a - b for a, b in pairs]
  if cell.by == "ratio":
    return [a / b for a, b in pairs if b]
  size = runs["adapter"].iloc[0] / 1000 if len(runs) else 1.0
  return [100 * (a - b) / b / size for a, b in pairs if b]


def _by_seed(measure: str, runs: pd.DataFrame) -> dict[int, float]:
  by_seed = {run.seed: _measured(measure, run) for run in runs.itertuples()}
  return {seed: x for seed, x in by_seed.items() if x is not None}


def _measured(measure: str, run: Any) -> float | None:
  """A number of a run: a row of the sweep's frame."""
  if measure in ("best", "last"):
    return float(run.score if measure == "best" else run.last)
  if measure == "parameters":
    return float(run.adapter)
  if measure in NORMS:
    table = pd.DataFrame(run.result.get("norms") or ())
    return None if table.empty else NORMS[measure](table[table["leaf"] == "d"])
  if measure in ("step_seconds", "peak_bytes"):
    return run.result.get("speed", {}).get(measure)
  value = run.result.get("test", {}).get("scores", {}).get(measure)
  return None if value is None else (100 if is_share(measure) else 1) * value


def _query_over_value(d: pd.DataFrame) -> float | None:
  of = {kind: d[d["kind"].str.endswith(kind)] for kind in ("query", "value")}
  if any(part.empty for part in of.values()):
    return None
  return float(of["query"]["norm"].mean() / of["value"]["norm"].mean())


def _upper_over_lower(d: pd.DataFrame) -> float:
  upper = d["layer"] > d["layer"].mean()
  return float(d[upper]["norm"].mean() / d[~upper]["norm"].mean())


NORMS: Mapping[str, Callable[[pd.DataFrame], float | None]] = {
  "smallest_d": lambda d: float(d["norm"].min()),
  "largest_d": lambda d: float(d["norm"].max()),
  "query_over_value": _query_over_value,
  "upper_over_lower": _upper_over_lower,
}


def contradiction(cell: Cell) -> str:
  """Why a printed number can't come from the paper's formula; else ""."""
  if cell.counted is None:
    return ""
  if cell.by == "gain":
    # An accuracy of chance, 50 % of two classes, can't more than double.
    gain = cell.score * cell.counted / 1000
    if gain <= 100:
      return ""
    return (
      f"{cell.printed} for each 1,000 of {cell.counted:,} parameters is a gain"
      f" of {gain:.0f}, in points or percent; from chance to no error it is 50"
      " points, or 100 %"
    )
  if abs(cell.score - cell.counted) <= cell.last_digit:
    return ""
  return f"the formula gives {cell.counted:,}"


def tolerance(cell: Cell, values: Sequence[float]) -> float | None:
  """How far ours may be off, by the rule above; None where no spread is known.

  Args:
    cell: the paper's.
    values: ours, at least one.
  """
  spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return tolerance_of(cell, spread, len(values))


def tolerance_of(cell: Cell, spread: float | None, runs: int) -> float | None:
  """The same by our spread, None where one run has none, and number of runs."""
  ours = cell.spread if spread is None else spread
  paper = spread if cell.spread is None else cell.spread
  if ours is None or paper is None:
    return None
  judged = cell.measure in JUDGED
  # questions of a judge are as many in the paper
  theirs = runs if judged else cell.runs
  freedom = [] if spread is None else [runs - 1]
  freedom += [] if cell.spread is None else [theirs - 1]
  factor = math.pi / 2 if cell.middle == "median" and not judged else 1.0
  error = math.sqrt(factor * (paper**2 / theirs + ours**2 / runs))
  quantile = float(stats.t.ppf(0.975, min(freedom)))
  return quantile * error + cell.last_digit / 2


def _judge(
  cell: Cell, values: Sequence[float]
) -> tuple[float | None, float | None, str, str]:
  """Ours, the tolerance, the verdict and a reason."""
  mean = cell.middle == "mean" or cell.measure in JUDGED
  ours = None
  if len(values):
    ours = float(np.mean(values) if mean else np.median(values))
  if reason := contradiction(cell):
    return ours, None, CONTRADICTS, reason
  if ours is None:
    return None, None, MISSING, _lacking(cell)
  if cell.counted is not None and cell.measure == "parameters":
    reason = f"the formula gives {cell.counted:,}"
    return ours, 0.0, _side(ours - cell.counted, 0.0), reason
  if cell.printed.startswith(">"):
    verdict = WITHIN if ours > cell.score else BELOW
    return ours, None, verdict, ""
  allowed = tolerance(cell, values)
  if allowed is None:
    reason = "one run, and the paper has no spread: train a second seed"
    return ours, None, MISSING, reason
  return ours, allowed, _side(ours - cell.score, allowed), ""


def _judge_average(
  cell: Cell, rows: Iterable[Mapping[str, Any]]
) -> tuple[float | None, float | None, str, str]:
  """The same of the average of a row's scores, which stand before it.

  Its interval is that of a mean of independent numbers.
  """
  row = [one for one in rows if one["row"] == cell.row]
  scores = [one for one in row if one["column"] != "parameters"]
  if any(one["verdict"] == MISSING for one in scores):
    return None, None, MISSING, "not all of its row"
  ours = float(np.mean([one["ours"] for one in scores]))
  squares = sum(one["tolerance"] ** 2 for one in scores)
  allowed = math.sqrt(squares) / len(scores) + cell.last_digit / 2
  return ours, allowed, _side(ours - cell.score, allowed), ""


def _side(difference: float, allowed: float) -> str:
  if abs(difference) <= allowed + 1e-9:
    return WITHIN
  return ABOVE if difference > 0 else BELOW


def _lacking(cell: Cell) -> str:
  if cell.measure in JUDGED:
    return "no judgments: --judgments=FILE"
  if cell.measure == "peak_bytes":
    return "no run, or on a device that doesn't say its peak of memory"
  return "no run"


def _differences(
  cell: Cell, runs: pd.DataFrame, planned: Iterable[Mapping[str, Any]]
) -> str:
  """Settings of the runs that are not those of the paper's run here."""
  if runs.empty or cell.measure in ("parameters", "average"):
    return ""
  plan = next(
    one for one in planned if belongs(flatten_dict(one, sep="."), cell.run)
  )
  wanted = _flat(plan, str(plan["method"]))
  differ: dict[str, list[str]] = {}
  for result in runs["result"]:
    theirs = _flat(result["config"], result["method"])
    for key in sorted(wanted.keys() & theirs.keys()):
      if theirs[key] != wanted[key]:
        shown = differ.setdefault(key, [])
        if str(theirs[key]) not in shown:
          shown.append(str(theirs[key]))
  return "; ".join(
    f"{key} {' or '.join(shown)}, not {wanted[key]}"
    for key, shown in differ.items()
  )


def _flat(config: Mapping[str, Any], method: str) -> dict[str, Any]:
  """Settings in effect, as JSON has them, the model by its last part."""
  flat = settings_of({"config": config, "method": method})
  flat["model.name"] = Path(str(flat.get("model.name"))).name
  return dict(json.loads(json.dumps(flat)))
