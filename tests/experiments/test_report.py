"""The tables that results are shown in."""

import copy
from pathlib import Path

import pandas as pd
import pytest

from experiments import quickstart, report_output
from vera_jax.report import load_sweep, summary, tables
from vera_jax.report.frame import Sweep, frame

ROOT = Path(__file__).resolve().parents[2]


def run(method, seed, scores, task="rte"):
  history = [{"epoch": i + 1, "score": score} for i, score in enumerate(scores)]
  config = {"task": task, "method": method, "model": {"name": "small"}}
  config["optim"] = {"epochs": len(scores)}
  return {
    "task": task,
    "method": method,
    "seed": seed,
    "score_name": "accuracy",
    "best": max(history, key=lambda epoch: epoch["score"]),
    "last": history[-1],
    "parameters": {"adapter": 1792, "head": 770, "frozen": 10**6},
    "config": config,
    "history": history,
    "seconds": 10.0 * (seed + 1),
  }


def test_one_row_per_task_and_method_over_its_seeds():
  results = [
    run("lora", 0, [0.5, 0.6]),
    run("vera", 2, [0.9, 0.8]),
    run("vera", 0, [0.7, 0.6]),
    run("vera", 1, [0.5, 0.55]),
  ]
  sweep = Sweep("", "", frame(results), [])
  lines = tables.markdown(tables.columns(summary(sweep))).splitlines()
  assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
  assert lines[2] == (
    "| rte | accuracy | vera | 1,792 | 770 | 70.0 (55.0 to 90.0)"
    " | 60.0 (55.0 to 80.0) | +10.0 | 3 | 2 | 20 |"
  )
  assert lines[3].startswith("| rte | accuracy | lora |")
  assert "| 60.0 | 60.0 |  | 1 | 2 | 10 |" in lines[3]


@pytest.mark.skipif(not (ROOT / "results").exists(), reason="not in a checkout")
def test_a_report_is_tables_and_figures(tmp_path, capsys, monkeypatch):
  sweep = load_sweep(ROOT / "results/minilm")
  report_output.write(sweep, tmp_path)
  names = {path.name for path in tmp_path.iterdir()}
  figures = {
    f"{n}.{kind}"
    for n in ("scores", "curves")
    for kind in ("png", "svg", "pdf")
  }
  assert names == figures | {
    *("table.md", "table.tex", "table.csv", "runs.csv")
  }
  table = pd.read_csv(tmp_path / "table.csv")
  assert len(pd.read_csv(tmp_path / "runs.csv")) == len(sweep.runs)
  assert table["seeds"].sum() == len(sweep.runs)
  head = table[(table["task"] == "cola") & (table["method"] == "head")]
  assert head["collapsed"].item() == 3  # one answer to everything
  report_output.show(sweep, "csv")
  assert capsys.readouterr().out == (tmp_path / "table.csv").read_text()
  for columns in (40, 60, 80, 200):
    monkeypatch.setenv("COLUMNS", str(columns))
    report_output.show(sweep, "terminal")
    shown = capsys.readouterr().out
    table, spared, _ = shown.partition("no room for")
    assert columns == 200 or max(map(len, table.splitlines())) <= columns
    # what the paper is about stays
    for text in ("vera", "7,680", "80.6", "(80.0 to", "cola", "parameters"):
      assert text in table
    assert bool(spared) == (columns < 200) != ("seconds" in table)
  report_output.show(sweep, "latex")
  latex = capsys.readouterr().out
  assert latex == (tmp_path / "table.tex").read_text(encoding="utf-8")
  assert r"\toprule" in latex and "CoLA" in latex and "seconds" not in latex
  rows = [x for x in latex.splitlines() if x.endswith(r"\\")]
  assert len(rows) == 10 and len({row.count(" & ") for row in rows}) == 1
  report_output.show(sweep, "auto")  # no terminal here
  page = (tmp_path / "table.md").read_text(encoding="utf-8")
  assert page.endswith(capsys.readouterr().out)


def test_verdicts_keep_the_papers_numbers_where_it_is_narrow():
  row = {"table": "2", "row": "large VeRA 1024", "column": "CoLA"}
  row |= {"paper": "68.0 ± 0.8", "ours": "67.51", "may differ by": "± 1.20"}
  cells = pd.DataFrame([{**row, "runs": "5", "verdict": "within", "note": ""}])
  for width in (40, 60):
    table = tables.for_terminal(cells, "Against the paper", width=width)
    names = [str(column.header) for column in table.columns]
    assert {"paper", "ours", "verdict"} <= {*names}


@pytest.mark.slow
def test_the_quickstart_compares_head_and_vera(
  tiny_config, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  small = tiny_config("quickstart", optim__epochs=1)
  monkeypatch.setattr(
    quickstart.quickstart, "get_config", lambda: copy.deepcopy(small)
  )
  quickstart.main()
  shown = capsys.readouterr().out
  assert "head alone" in shown and "VeRA" in shown
  assert len(list(tmp_path.glob("runs/**/result.json"))) == 2
