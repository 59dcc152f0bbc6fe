"""Each number of the paper has runs that make it, and a verdict by one rule."""

import json
import math

import pytest
from flax.traverse_util import flatten_dict

from configs import open_choices, paper
from vera_jax.errors import UserError
from vera_jax.report import tables
from vera_jax.report.frame import Sweep, frame
from vera_jax.report.published import Cell, belongs, cells
from vera_jax.report.verdict import (
  ABOVE,
  BELOW,
  CONTRADICTS,
  MISSING,
  WITHIN,
  contradiction,
  read_judgments,
  tolerance,
  verdicts,
)

EPOCHS = open_choices.EPOCH.value


def judged(results, paper_model="", **options):
  sweep = Sweep("", paper_model, frame(results), [])
  table = verdicts(sweep, paper.planned, epochs=EPOCHS, **options)
  return table.set_index(["table", "row", "column"])


@pytest.mark.parametrize("table", paper.SOURCES)
def test_each_number_has_runs_in_its_sweeps(table):
  same = {json.dumps(one, default=str): one for one in paper.planned(table)}
  planned = [*same.values()]
  mine = [cell for cell in cells() if cell.table == table]
  assert mine
  for cell in mine:
    for run in (cell.run, cell.against):
      if run is None:
        continue
      settings = [
        one for one in planned if belongs(flatten_dict(one, sep="."), run)
      ]
      assert settings, cell
      if "task" in run and "parameters" != cell.measure:
        seeds = [one["seed"] for one in settings]
        assert len(seeds) == len({*seeds}), cell
        if cell.runs == 5:
          assert len(seeds) == 5


def test_every_table_of_the_paper_has_a_source():
  assert {cell.table for cell in cells()} == {*paper.SOURCES}


def test_which_printed_numbers_contradict_the_papers_own_formula():
  wrong = {(cell.table, cell.row) for cell in cells() if contradiction(cell)}
  assert wrong == {
    ("Table 3", "GPT-2 medium, LoRA"),
    ("Table 3", "GPT-2 large, LoRA"),
    ("Figure 4", "RoBERTa-large on RTE, LoRA"),
    ("Figure 4", "RoBERTa-large on RTE, VeRA"),
  }


def test_the_rule():
  cell = Cell("T", "r", "c", "80.0", {}, spread=1.0, runs=5, middle="mean")
  same = [79.0, 79.5, 80.0, 80.5, 81.0]  # a spread of 0.79
  error = math.sqrt((1.0 + 0.625) / 5)
  assert tolerance(cell, same) == pytest.approx(2.776 * error + 0.05, abs=1e-3)
  median = cell._replace(middle="median")
  assert tolerance(median, same) == pytest.approx(
    2.776 * error * math.sqrt(math.pi / 2) + 0.05, abs=1e-3
  )
  # one run of ours has the paper's spread; one of each has none
  one = 2.776 * math.sqrt(1 / 5 + 1)
  assert tolerance(cell, [80.0]) == pytest.approx(one + 0.05, abs=1e-3)
  assert tolerance(cell._replace(spread=None), [80.0]) is None
  # a number of the paper without a spread is taken as one run with ours
  alone = cell._replace(spread=None, runs=1)
  assert tolerance(alone, same) == pytest.approx(
    2.776 * math.sqrt(0.625 * (1 + 1 / 5)) + 0.05, abs=1e-3
  )


def test_within_above_below_and_what_differs(make_result):
  def scores(middle):
    return [middle + x for x in (-0.006, -0.003, 0.0, 0.003, 0.006)]

  found = {}
  for middle, epochs in ((0.859, 40), (0.93, 2), (0.80, 2)):
    results = [
      make_result("vera", seed, (0.5,) * (epochs - 1) + (score,), adapter=61440)
      for seed, score in enumerate(scores(middle))
    ]
    table = judged(results)
    row = table.loc["Table 2", "RoBERTa-large, VeRA", "rte"]
    found[middle] = row["verdict"]
    assert row["runs"] == 5
    assert row["ours"] == pytest.approx(100 * middle)
    count = table.loc["Table 2", "RoBERTa-large, VeRA", "parameters"]
    assert count["verdict"] == WITHIN
    assert row["differences"] == (
      "" if epochs == 40 else "optim.epochs 2, not 40"
    )
    assert table.loc["Table 2", "RoBERTa-base, VeRA", "rte"]["verdict"] == (
      MISSING
    )
    text = tables.paper_page(table.reset_index())
    assert ("optim.epochs 2, not 40" in text) == (epochs == 2)
  assert found == {0.859: WITHIN, 0.93: ABOVE, 0.80: BELOW}


def test_a_count_that_is_not_the_formulas(make_result):
  table = judged([make_result(adapter=2 * 2 * (1024 + 256))])
  row = table.loc["Table 2", "RoBERTa-large, VeRA", "parameters"]
  assert row["verdict"] == BELOW and "61,440" in row["note"]


def test_pairs_of_runs_and_norms(make_result):
  norms = [
    {"layer": n, "kind": kind, "leaf": "d", "size": 4, "rms": 1.0}
    | {"norm": 4.0 + n / 3.3 + (kind == "query")}
    for n in range(24)
    for kind in ("query", "value")
  ]
  results = [
    *(make_result("vera", s, (0.85 + s / 1e3,), norms=norms) for s in (0, 1)),
    *(make_result("head", s, (0.6,), adapter=0) for s in (0, 1)),
    make_result("vera", 0, (0.84,), vera__rank=1024),
    make_result("vera", 1, (0.85,), vera__rank=1024),
    make_result("lora", 0, (0.80,), lora__rank=1),
    make_result("lora", 1, (0.80,), lora__rank=1),
  ]
  table = judged(results).reset_index().set_index(["table", "column"])
  claim = table.loc["Figure 2"].iloc[0]
  assert claim["ours"] == pytest.approx(4.5) and claim["verdict"] == WITHIN
  norms = table.loc["Figure 3"]
  assert list(norms["verdict"]) == [WITHIN] * 4
  gain = table.loc["Figure 4"].iloc[1]
  assert gain["verdict"] == CONTRADICTS
  assert gain["ours"] == pytest.approx(100 * 0.2505 / 0.6 / 1.792, rel=1e-6)


def test_a_model_that_stands_in_for_the_papers(make_result):
  results = [
    make_result("vera", s, (0.7, 0.7), model__name="package:a/b", vera__rank=64)
    for s in (0, 1)
  ]
  table = judged(results, "roberta-large")
  row = table.loc["Table 2", "RoBERTa-large, VeRA", "rte"]
  assert row["verdict"] == BELOW
  assert "model.name b, not roberta-large" in row["differences"]
  assert "vera.rank 64, not 256" in row["differences"]
  assert judged_nothing(results)


def judged_nothing(results):
  sweep = Sweep("", "", frame(results), [])
  return verdicts(sweep, paper.planned, epochs=EPOCHS).empty


def test_the_average_of_a_row(make_result):
  printed = {"sst2": 96.1, "mrpc": 90.9, "cola": 68.0}
  printed |= {"qnli": 94.4, "rte": 85.9, "stsb": 91.7}
  results = [
    make_result("vera", s, (x / 100 + s / 1e3,), task=task)
    for task, x in printed.items()
    for s in (-1, 0, 1)
  ]
  key = "Table 2", "RoBERTa-large, VeRA", "average"
  row = judged(results).loc[key]
  assert row["ours"] == pytest.approx(sum(printed.values()) / 6)
  assert row["verdict"] == WITHIN and row["tolerance"] < 0.7
  assert judged(results[3:]).loc[key]["verdict"] == MISSING


def test_a_judges_scores(tmp_path):
  file = tmp_path / "gpt-4_single.jsonl"
  lines = [
    {"question_id": q, "model": "run", "turn": turn, "score": score}
    for q, turn, score in [(81, 1, 6), (81, 2, 1), (82, 1, 4), (1, 1, 9)]
  ]
  file.write_text("\n".join(map(json.dumps, lines)))
  assert read_judgments(file, 1) == {
    ("run", "mt_bench"): [6.0, 4.0],
    ("run", "vicuna"): [9.0],
  }
  file.write_text('{"question_id": 81}')
  with pytest.raises(UserError, match="jsonl:1 is no judgment"):
    read_judgments(file, 1)
