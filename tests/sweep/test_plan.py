"""Which runs a sweep has, and how they are shared out."""

import json

import pytest
from ml_collections import ConfigDict

from configs.sweeps import cross, difference, product, seeds, zipped
from vera_jax import results
from vera_jax.errors import UserError
from vera_jax.locks import locked
from vera_jax.sweep.plan import (
  in_queues,
  make_plan,
  make_units,
  parse_shard,
  shard_of,
  write_plan,
)
from vera_jax.train.ensemble import group_key


def test_products_and_zips():
  assert product({"a": (1, 2), "b": "xy"}) == [
    {"a": 1, "b": "x"},
    {"a": 1, "b": "y"},
    {"a": 2, "b": "x"},
    {"a": 2, "b": "y"},
  ]
  assert zipped({"a": (1, 2), "b": "xy"}) == [
    {"a": 1, "b": "x"},
    {"a": 2, "b": "y"},
  ]
  with pytest.raises(ValueError, match="shorter|longer"):
    zipped({"a": (1, 2), "b": "x"})
  assert cross([{"a": 1}, {"a": 2}], seeds((0, 1)))[-1] == {"a": 2, "seed": 1}


def test_a_difference_makes_the_other_config(tiny_config):
  one, other = tiny_config("rte"), tiny_config("cola", vera__rank=3)
  changes = difference(one, other)
  assert changes["task"] == "cola" and changes["vera.rank"] == 3
  assert "optim.batch_size" not in changes
  one.update_from_flattened_dict(changes)
  assert one.to_dict() == other.to_dict()


def test_every_run_has_its_settings_and_a_folder_of_its_own(tiny_sweep):
  plan = tiny_sweep()
  assert [(r.config.method, r.config.seed) for r in plan.runs] == [
    ("vera", 0),
    ("vera", 1),
    ("vera", 0),
    ("vera", 1),
    ("lora", 0),
    ("lora", 1),
  ]
  assert [r.config.vera.rank for r in plan.runs][:4] == [2, 2, 8, 8]
  assert plan.axes == ("method", "vera.rank", "seed")
  assert plan.runs[0].name.startswith("vera-rank2-seed0-")
  assert len({run.folder for run in plan.runs}) == 6


def test_the_same_run_twice_is_one(tiny_sweep):
  same = product({"vera.d_init": (0.1,)}) + product(
    {"vera.sharing": ["shared"]}
  )
  assert len(tiny_sweep(cross(same, seeds((0, 1)))).runs) == 2


def test_what_the_command_line_sets_no_override_changes(tiny_sweep):
  plan = tiny_sweep(fixed=["seed"], seed=7)
  assert [run.config.seed for run in plan.runs] == [7, 7, 7]


@pytest.mark.parametrize(
  "override, words",
  [
    ({"vera.rnak": 3}, "vera.rnak=3"),
    ({"vera.rank": "many"}, "vera.rank='many'"),
    ({"optim.batch_size": 0}, "batch_size is 0"),
    ({"data.max_train_examples": "20"}, "max_train_examples='20'"),
  ],
)
def test_a_wrong_override_is_named(tiny_sweep, override, words):
  with pytest.raises(UserError, match=words):
    tiny_sweep([override])


def test_what_a_folder_holds_is_the_state(tiny_sweep):
  run = tiny_sweep().runs[0]
  assert run.state == "new"
  run.folder.mkdir(parents=True)
  (run.folder / "config.json").write_text("{}")
  assert run.state == "unfinished"
  results.write(run.folder, {"failed": "loss is nan"}, results.FAILED)
  assert run.state == "failed" and run.failure() == "loss is nan"
  with locked([run.lock]):
    assert run.state == "running"
  results.write(run.folder, {"score": 1.0})
  assert run.state == "done"


def test_units_train_together_and_are_no_larger_than_asked(tiny_sweep):
  runs = tiny_sweep().runs
  found = make_units(runs, most=8)
  assert [len(unit) for unit in found] == [2, 2, 2]
  for unit in found:
    assert len({group_key(run.config) for run in unit}) == 1
  assert [len(unit) for unit in make_units(runs, most=1)] == [1] * 6
  many = tiny_sweep(seeds(range(9))).runs
  assert [len(unit) for unit in make_units(many, most=4)] == [3, 3, 3]
  (queue,) = in_queues(make_units(many, most=4))
  assert queue == many
  assert in_queues(found) == found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
def test_shards_take_every_run_once(tiny_sweep, count):
  runs = tiny_sweep().runs
  shared = make_units(runs, most=8, shards=count)
  taken = [
    run.name
    for index in range(count)
    for unit in shard_of(shared, index, count)
    for run in unit
  ]
  assert sorted(taken) == sorted(run.name for run in runs)
  sizes = [len(shard_of(shared, i, count)) for i in range(count)]
  assert min(sizes) > 0 or count > len(runs)


def test_a_shard_is_counted_from_zero():
  assert parse_shard(None) == (0, 1) and parse_shard("3/4") == (3, 4)
  for text in ("4/4", "1", "0/0", "-1/2", "a/b"):
    with pytest.raises(UserError, match="from 0 to n - 1"):
      parse_shard(text)


def test_the_report_is_told_what_the_sweep_is(tiny_sweep, tmp_path):
  plan = tiny_sweep()
  write_plan(plan)
  write_plan(plan)  # as another shard does
  about = json.loads((tmp_path / "sweep.json").read_text())
  assert about["title"] == "Tiny" and len(about["runs"]) == 6
  assert list(tmp_path.glob(".sweep*")) == []
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(UserError, match="can't be used"):
    write_plan(tiny_sweep(folder=blocked / "sweep"))


def test_a_sweep_of_ones_own_has_what_all_have(tmp_path):
  with pytest.raises(UserError, match="lacks title, paper, base, overrides"):
    make_plan(ConfigDict(), tmp_path)
  sweep = ConfigDict(dict.fromkeys(("title", "paper", "base", "members"), ""))
  sweep.overrides = ()
  for overrides in (3, [3], [["task"]]):
    with sweep.ignore_type():
      sweep.overrides = overrides
    with pytest.raises(UserError, match="are no list of settings"):
      make_plan(sweep, tmp_path)


def test_what_is_done_moves_nothing_between_shards(tiny_sweep):
  def shares(runs):
    shared = make_units(runs, most=8, shards=2)
    return [
      [run.name for unit in shard_of(shared, i, 2) for run in unit]
      for i in (0, 1)
    ]

  runs = tiny_sweep().runs
  before = shares(runs)
  runs[0].folder.mkdir(parents=True)
  results.write(runs[0].folder, {"score": 1.0})
  assert shares(tiny_sweep().runs) == before
