"""The summary of a sweep, and what it says of differences."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.report import load_sweep, summary, tables
from vera_jax.report.frame import Sweep, frame, method_title
from vera_jax.report.summary import holm, paired


def test_one_row_per_condition_over_its_seeds(rank_sweep):
  table = summary(rank_sweep)
  assert list(table["condition"]) == [
    *("rank 1", "rank 16", "rank 256"),
    *("rank 1", "rank 8"),
  ]
  row = table.iloc[1]
  assert (row["score"], row["low"], row["high"]) == (70, 69, 71)
  assert (row["seeds"], row["adapter"], row["head"]) == (3, 660, 770)


def test_what_is_not_the_methods_own_makes_no_condition(make_result):
  runs = frame(
    [
      make_result("vera", 0, vera__rank=4, lora__rank=1),
      make_result("vera", 1, vera__rank=4, lora__rank=2),
      make_result("vera", 2, vera__rank=4, log__every=3),
      make_result("lora", 0, vera__rank=8),
    ]
  )
  assert list(runs["condition"]) == [""] * 4


def test_a_variant_and_a_chain_have_the_settings_of_their_methods(make_result):
  runs = frame(
    [
      make_result("dvora", 0, vera__rank=4, lora__rank=1),
      make_result("dvora", 1, vera__rank=4, lora__rank=2),
      make_result("dvora", 2, vera__rank=8),
      make_result("ia3+lora", 0, lora__rank=8, vera__rank=4),
      make_result("ia3+lora", 1, lora__rank=8, vera__rank=8),
      make_result("ia3", 0),
    ]
  )
  assert list(runs["rank"].dropna()) == [4, 4, 8, 8, 8]
  names = dict(zip(runs["method"], runs["condition"], strict=True))
  assert names == {"ia3": "", "dvora": "rank 8", "ia3+lora": ""}
  assert method_title("ia3+lora") == "IA3 + LoRA"


def test_the_difference_is_paired_with_the_best_lora(rank_sweep):
  row = summary(rank_sweep).iloc[1]  # vera, rank 16
  ours, theirs = np.array([69.0, 70, 71]), np.array([72.0, 74, 75])
  assert row["reference"] == "lora rank 8" and row["pairs"] == 3
  assert row["difference"] == pytest.approx((ours - theirs).mean())
  known = stats.ttest_rel(ours, theirs)
  interval = known.confidence_interval(0.95)
  assert row["p"] == pytest.approx(known.pvalue)
  assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(interval))
  assert row["p_holm"] >= row["p"]
  assert np.isnan(summary(rank_sweep).iloc[4]["p"])  # LoRA itself


def test_only_seeds_that_both_have_are_compared():
  found = paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.0, 1: 0.5, 7: 3.0})
  assert found["pairs"] == 2 and found["difference"] == 1.25
  assert paired({0: 1.0}, {1: 1.0})["pairs"] == 0
  alone = paired({0: 1.0}, {0: 0.5})
  assert alone["difference"] == 0.5 and np.isnan(alone["p"])
  same = paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})  # no noise to test against
  assert same["difference"] == same["ci_low"] == same["ci_high"] == 0.5
  assert np.isnan(same["p"])


def test_holm():
  adjusted = holm(pd.Series([0.01, 0.04, np.nan, 0.03]))
  np.testing.assert_allclose(adjusted, [0.03, 0.06, np.nan, 0.06])


def test_the_table_shows_paper_difference_and_collapse(make_result):
  found = [
    *(make_result("vera", s, (0.85, 0.86), vera__rank=256) for s in (0, 1)),
    *(make_result("lora", s, (0.80, 0.81 + s / 100)) for s in (0, 1)),
    make_result("vera", 0, (0.5,), vera__d_init=1.0, collapsed=True),
  ]
  sweep = Sweep("T", "", frame(found), [{"run": "x", "failed": "nan\nmore"}])
  table = summary(sweep)
  cells = tables.columns(table)
  assert list(cells["paper"][:2]) == ["85.9 ± 0.7", "60.3 ± 12.4"]
  difference = cells["difference from LoRA (95 % interval)"]
  assert difference[0].startswith("+4.5 (")
  assert list(cells[tables.SIGNS]) == ["", "collapsed", ""]
  assert "d_init 1" in cells["condition"][1]
  lines = tables.markdown(cells).splitlines()
  assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
  assert "x failed: nan" in tables.notes(sweep, table)


def test_a_folder_is_read_with_its_title_and_its_failures(
  make_result, tmp_path
):
  for name, seed in (("a", 0), ("b", 1)):
    (tmp_path / "runs" / name).mkdir(parents=True)
    results.write(tmp_path / "runs" / name, make_result(seed=seed))
  (tmp_path / "runs/c").mkdir()
  results.write(tmp_path / "runs/c", {"failed": "nan"}, results.FAILED)
  about = {"title": "A sweep", "paper": "roberta-large"}
  (tmp_path / "sweep.json").write_text(json.dumps(about))
  sweep = load_sweep(tmp_path)
  assert (sweep.title, sweep.paper) == ("A sweep", "roberta-large")
  assert [failure["run"] for failure in sweep.failed] == ["c"]
  by_seed = sweep.runs.set_index("seed")
  assert by_seed.loc[0, "folder"] == tmp_path / "runs/a"
  with pytest.raises(UserError, match="no result.json.*: 1 runs failed"):
    load_sweep(tmp_path / "runs/c")


def written(folder, **found):
  """A folder of result.json files, one below each name."""
  for name, result in found.items():
    (folder / name).mkdir(parents=True)
    results.write(folder / name, result)
  return folder


def test_a_damaged_file_is_named_and_the_others_are_reported(
  make_result, tmp_path
):
  written(tmp_path, a=make_result(), b={"score": 1.0}, c={}, d={}, e={})
  (tmp_path / "c/result.json").write_text('{"score": ')
  (tmp_path / "d/result.json").write_bytes(b"\xff\xfe")
  broken = make_result(seed=1) | {"best": None}
  (tmp_path / "e/result.json").write_text(json.dumps(broken))
  (tmp_path / "b/failed.json").write_text("[]")
  (tmp_path / "c/failed.json").write_text("{}")
  (tmp_path / "sweep.json").write_text("")
  sweep = load_sweep(tmp_path)
  assert list(sweep.runs["seed"]) == [0]
  notes = tables.notes(sweep, summary(sweep))
  assert "c failed: no reason is known" in notes
  for file in (*(f"{x}/result.json" for x in "bcde"), "b/failed", "sweep"):
    assert sum("Left out" in line and file in line for line in notes) == 1
  (tmp_path / "sweep.json").write_text('{"runs": 3}')
  assert any("no runs by" in line for line in load_sweep(tmp_path).remarks)
  (tmp_path / "a/result.json").unlink()
  with pytest.raises(UserError, match=r"no result.json(.|\n)*c/result.json"):
    load_sweep(tmp_path)


@pytest.mark.parametrize(
  "changes",
  [
    {"seconds": []},
    {"config": {"model": {"name": {}}}},
    {"config": {"vera": {"rank": "8"}}},
    {"test": {"scores": {"BLEU": None}, "inputs": 2, "missing": ""}},
  ],
)
def test_a_result_of_other_types_is_left_out(changes, make_result, tmp_path):
  odd = make_result(seed=1)
  for name, value in changes.items():
    if name == "config":
      ((group, settings),) = value.items()
      value = {**odd["config"], group: {**odd["config"][group], **settings}}
    odd[name] = value
  sweep = load_sweep(written(tmp_path, a=make_result(), b=odd))
  assert list(sweep.runs["seed"]) == [0]
  assert "b/result.json is no run's result" in sweep.remarks[0]


def test_a_run_in_two_folders_counts_once(make_result, tmp_path):
  data = {"train": {"examples": 9, "fingerprint": "abc"}}
  found = [make_result(seed=s, size="base") | {"data": data} for s in (0, 1, 2)]
  one = written(tmp_path / "one", a=found[0], b=found[1], c=found[2])
  again = copy.deepcopy(found[0])
  again["config"]["log"]["every"] = 7  # changes nothing of the run
  again["config"]["data"]["source"] = "elsewhere/glue"
  other = copy.deepcopy(found[1]) | {"data": {"train": {"fingerprint": "x"}}}
  better = copy.deepcopy(found[2])
  better["best"]["score"] = 0.99
  two = written(tmp_path / "two", d=again, e=other, f=better)
  sweep = load_sweep(one, two)
  assert sorted(sweep.runs["seed"]) == [0, 1, 1, 2]
  assert sweep.runs["score"].max() < 99
  (remark,) = sweep.remarks
  assert remark.startswith("Not counted again: 2 results")
  assert remark.endswith("two/f.") and "two/d" not in remark
  # a folder within another brings nothing twice, and nothing to remark
  assert len(load_sweep(tmp_path / "one", one / "a").runs) == 3
  assert load_sweep(tmp_path / "one", one / "a").remarks == ()


def test_the_lora_of_another_data_size_is_no_reference(make_result):
  sizes = {100: (0.6, 0.5), 900: (0.8, 0.9), 500: (0.7, None)}
  found = [
    make_result(method, seed, (score,), data__max_train_examples=size)
    for size, scores in sizes.items()
    for method, score in zip(("vera", "lora"), scores, strict=True)
    for seed in (0, 1)
    if score is not None
  ]
  sweep = Sweep("", "", frame(found), [])
  table = summary(sweep).set_index(["method", "condition"])["difference"]
  assert table["vera", "max_train_examples 100"] == pytest.approx(10)
  assert table["vera", "max_train_examples 900"] == pytest.approx(-10)
  assert np.isnan(table["vera", "max_train_examples 500"])
  notes = "\n".join(tables.notes(sweep, summary(sweep)))
  assert "LoRA condition of the same base and data that" in notes
