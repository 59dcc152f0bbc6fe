"""Scores of test texts, and these texts side by side."""

import pandas as pd
import pytest

from experiments import report_output
from tests.report.test_plots import overlaps
from vera_jax import results
from vera_jax.report import plots, tables
from vera_jax.report.frame import UNTUNED, Sweep, frame, load_sweep, steps
from vera_jax.report.outputs import side_by_side
from vera_jax.report.summary import holm, paired, summary
from vera_jax.report.text_scores import text_notes, text_scores, text_tables

BLEU = {
  "vera": (0.50, 0.52, 0.57),
  "lora": (0.55, 0.56, 0.58),
}
INPUTS = [f"name : Place {n} | area : centre" for n in range(8)]


@pytest.fixture(scope="module")
def folder(make_result, tmp_path_factory):
  """Two methods with three seeds, and the untuned model asked in two ways."""
  folder = tmp_path_factory.mktemp("texts")
  asked = {"plain": "{}", "chat": "user:\n{}\nassistant:"}
  found = {
    f"{method}{seed}": make_result(method, seed)
    | with_scores(bleu, 2 + seed / (4 if method == "vera" else 3))
    for method, row in BLEU.items()
    for seed, bleu in enumerate(row)
  }
  for name, prompt in asked.items():
    untuned = make_result()
    untuned["learning_rates"] = {"adapter_lr": 0.0, "head_lr": 0.0}
    untuned["config"]["data"]["prompt"] = prompt
    found[name] = untuned | with_scores(0.1, 0.2)
  for name, result in found.items():
    place = folder / "runs" / name
    (place / "test").mkdir(parents=True)
    results.write(place, result)
    said = ["Place"] * len(INPUTS)
    said[3 if name == "lora0" else 6] = f"{name} is in the centre"
    write(place / "test", INPUTS, said)
    (place / "metrics.jsonl").write_text(
      '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
      '{"step": 2, "epoch": 1, "loss": 9.0}\n{"step": 3, "lo'
    )
  return folder


def with_scores(bleu, nist):
  scores = {"BLEU": bleu, "NIST": nist}
  return {"test": {"inputs": 8, "scores": scores, "missing": "no Java"}}


def write(place, inputs, outputs):
  (place / "inputs.txt").write_text("".join(f"{one}\n" for one in inputs))
  (place / "outputs.txt").write_text("".join(f"{one}\n" for one in outputs))
  (place / "references.txt").write_text(
    "\n".join(f"It is in the centre\nOr {n}\n" for n in range(len(inputs)))
  )


@pytest.fixture(scope="module")
def sweep(folder) -> Sweep:
  return load_sweep(folder)


def test_a_run_that_trained_nothing_is_a_row_of_its_own(sweep):
  untuned = sweep.runs[sweep.runs["method"] == UNTUNED]
  assert set(untuned["condition"]) == {"prompt {}", "prompt user: …"}
  assert not untuned[["adapter", "head"]].to_numpy().any()
  assert untuned["rank"].isna().all()


def test_prompts_with_the_same_first_line_are_told_apart(make_result):
  found = []
  for prompt in ("user:\n{}", "user:\nNow: {}"):
    found.append(make_result())
    found[-1]["config"]["data"]["prompt"] = prompt
  names = ["prompt user: Now: {}", "prompt user: {}"]
  assert sorted(frame(found)["condition"]) == names


def test_differences_are_paired_by_metric_and_adjusted_over_all(sweep):
  table = summary(text_scores(sweep)).query("method != @UNTUNED")
  table = table.set_index(["metric", "method"])
  ours, theirs = (
    dict(enumerate(100 * bleu for bleu in BLEU[method]))
    for method in ("vera", "lora")
  )
  found, known = table.loc[("BLEU", "vera")], paired(ours, theirs)
  of_nist = table.loc[("NIST", "vera")]["difference"]
  assert of_nist == pytest.approx(-1 / 12)
  assert found["difference"] == pytest.approx(known["difference"])
  assert found["p"] == pytest.approx(known["p"])
  compared = table[table["p"].notna()]
  assert len(compared) == 2
  adjusted = holm(pd.Series(compared["p"].to_numpy()))
  assert list(compared["p_holm"]) == pytest.approx(list(adjusted))


def test_the_tables_have_a_column_per_metric(sweep):
  scores, differences = text_tables(text_scores(sweep)).values()
  assert list(scores["method"]) == [UNTUNED, UNTUNED, "vera", "lora"]
  row = scores.iloc[2]
  assert row["BLEU"] == "52.0 (50.0 to 57.0)"
  assert row["NIST"] == "2.25 (2.00 to 2.50)"
  assert scores.iloc[0]["BLEU"] == "10.0"  # one seed
  assert list(differences["method"]) == ["vera"]
  assert differences.iloc[0]["BLEU"].startswith("-3.3 (")
  page = tables.page(sweep, summary(sweep))
  assert "- no Java" in page and "8 test inputs" in page


def test_what_runs_forgot_is_compared_with_the_least(make_result):
  """Also of runs that wrote no texts; less is better."""
  found = []
  for method, rank, forgot in (
    *(("lora", 1, 0.05), ("lora", 8, 0.2)),
    *(("vera", 4, 0.0124), ("vera", 4, 0.0126)),
  ):
    found.append(make_result(method, len(found) % 2))
    found[-1]["config"][method]["rank"] = rank
    found[-1]["general"] = {"before": 1.0, "forgetting": forgot}
  forgetting = text_scores(Sweep("", "", frame(found), [], ()))
  scores, differences = text_tables(forgetting).values()
  assert scores.iloc[0]["forgetting"] == "0.013 (0.012 to 0.013)"
  table = summary(forgetting)
  assert table.iloc[0]["reference"] == "lora rank 1"
  assert differences.iloc[0]["forgetting"].startswith("-0.038")
  (note, _) = text_notes(forgetting)
  assert "nats per token" in note


def test_the_figures_of_test_texts_and_of_logged_steps(sweep):
  logged = steps(sweep.runs)
  assert len(logged) == 2 * len(sweep.runs) and logged["loss"].max() == 3.0
  made = dict(plots.figures(sweep, summary(sweep)))
  assert len(made["texts"].axes) == 2 and len(made["losses"].axes) == 1
  for name in ("texts", "losses"):
    assert overlaps(made[name]) == ([], [])


def test_outputs_stand_side_by_side(sweep):
  page = side_by_side(sweep)
  tables_of = page.split("\n**")[1:]
  shown = [part.partition("`")[2].partition("`")[0] for part in tables_of]
  # the first two; two without a good answer; the one with one, with two
  assert shown == [INPUTS[n] for n in (0, 1, 2, 4, 3, 6)]
  for part in tables_of:
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]]
    assert names == [
      *("the reference", "untuned, prompt user: …", "untuned, prompt {}"),
      *("VeRA", "LoRA"),
    ]
  assert "| VeRA | vera0 is in the centre |" in tables_of[-1]
  assert "vera1" not in page  # the lowest seed's


def test_the_report_writes_them(sweep, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(plots, "figures", lambda *_, **__: ())
  report_output.write(sweep, tmp_path)
  names = {path.name for path in tmp_path.iterdir()}
  assert {"outputs.md", "texts.csv"} <= names
  report_output.show(sweep, "terminal")
  assert "Test texts" in capsys.readouterr().out
