"""The benchmarks measure what they say, on a model of seconds."""

import json
from pathlib import Path

import pytest

from benchmarks import bank, report, step

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
  "theirs", [False, pytest.param(True, marks=pytest.mark.parity)]
)
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
def test_all_variants_give_the_banks_logits(
  theirs, tiny_model, tiny_tasks, monkeypatch, tmp_path, capsys
):
  if theirs:
    pytest.importorskip("peft")
  else:
    monkeypatch.setattr(bank, "find_spec", lambda name: None)
  result = report.environment("bank") | bank.measure(
    str(tiny_model),
    task="rte",
    source=str(tiny_tasks),
    adapters=3,
    examples=12,
    rank=8,
    repetitions=1,
    batch=3,
  )
  names = [bank.PASSES, *([bank.PEFT] if theirs else [])]
  for name in names:
    assert result["ways"][name]["largest_logit_difference"] < 1e-5
  assert result["logits_apart_between_adapters"] > 1e-3
  assert len(result["ways"]) == (5 if theirs else 3)
  assert "benchmarks.bank" in result["command"]
  result["roberta_base"] = bank.allocate(5, rank=16)
  assert result["roberta_base"]["bytes"] == 5 * 24 * (16 + 768) * 4
  bank.show(result)
  shown = capsys.readouterr().out
  assert ("PEFT is left out" in shown) != theirs
  written = report.write("bank", result, folder=str(tmp_path / "new"))
  assert json.loads(written.read_text()) == result


STEPS = sorted((ROOT / "results/benchmarks").glob("step-*.json"))


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_steps_table_is_that_of_the_figures(path):
  result = json.loads(path.read_text())
  assert step.markdown(result) == path.with_suffix(".md").read_text()
  for costs in result["sizes"].values():
    frozen, whole, *plans, lora = (costs[name] for name in costs)
    folded = next(cost for name, cost in costs.items() if "folded" in name)
    factored = next(cost for name, cost in costs.items() if "factored" in name)
    assert min(plan["flops"] for plan in plans) <= 1.02 * whole["flops"]
    assert folded["temporary"] <= factored["temporary"]
    assert lora["flops"] < 1.02 * frozen["flops"]
