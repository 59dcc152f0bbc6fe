"""Runs that train together: each is the run alone, whatever befalls others."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from vera_jax.train.group import titles

from vera_jax import group_key, train_members
from vera_jax.adapters.norms import norms_beside
from vera_jax.errors import UserError
from vera_jax.train import loop
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted

# What a member may have its own: seed, both rates, weight decay, d_init.
OTHER = {
  "seed": 1,
  "optim__adapter_lr": 0.01,
  "optim__head_lr": 0.1,
  "optim__weight_decay": 0.3,
  "vera__d_init": 0.5,
}
# Batched products may sum in another order. Measured after these 30 steps: the
# losses differ by 2.4e-7 and the leaves by 1.8e-7 at most.
ATOL = 2e-6


class Group(NamedTuple):
  configs: list[ConfigDict]
  folders: list[Path]
  results: list[dict]


def train(configs, folder) -> Group:
  folders = [folder / str(i) for i in range(len(configs))]
  return Group(configs, folders, train_members(configs, folders))


@pytest.fixture(scope="session")
def together(tiny_config, tmp_path_factory) -> Group:
  """Three members, three epochs, left alone. Look, don't touch."""
  configs = [tiny_config(), tiny_config(**OTHER), tiny_config(seed=2)]
  return train(configs, tmp_path_factory.mktemp("together"))


def curve(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def result_of(folder):
  result = json.loads((folder / "result.json").read_text())
  del result["seconds"]
  return result


def assert_alike(folder, alone):
  """The same run but for the order of sums."""
  np.testing.assert_allclose(curve(folder), curve(alone), rtol=0, atol=ATOL)
  leaves, others = (
    load_file(place / "adapter" / "adapter.safetensors")
    for place in (folder, alone)
  )
  assert leaves.keys() == others.keys()
  for name, leaf in leaves.items():
    np.testing.assert_allclose(
      leaf, others[name], rtol=0, atol=ATOL, err_msg=name
    )
  one, two = map(result_of, (folder, alone))
  for result in (one, two):
    result["history"] = [{**e, "train_loss": 0} for e in result["history"]]
    for key in ("best", "last", "members", "norms"):  # the leaves say it
      del result[key]
  assert one == two


def assert_same_bits(folder, other):
  for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
    assert (folder / name).read_bytes() == (other / name).read_bytes(), name
  assert result_of(folder) == result_of(other)


def test_a_member_is_the_run_alone(together, finished):
  assert_alike(together.folders[0], finished.folder)
  assert together.results[0]["members"] == 3
  assert finished.result["members"] == 1
  names = {path.name for path in finished.folder.iterdir()}
  for folder in together.folders:
    assert {path.name for path in folder.iterdir()} == names


def test_one_with_settings_of_its_own_too(together, tmp_path):
  train_and_evaluate(together.configs[1], tmp_path)
  assert_alike(together.folders[1], tmp_path)
  first = [curve(folder)[0] for folder in together.folders]
  assert len(set(first)) == 3  # seeds and d_init differ from the first step


def test_members_on_a_mesh_of_all_axes(tiny_config, tmp_path):
  """Stacked leaves and slots keep the base's shards; here all are trained."""
  settings = {"method": "full", "optim__epochs": 1}
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  both = [tiny_config(**settings, **mesh, seed=seed) for seed in (0, 1)]
  group = train(both, tmp_path)
  alone = tmp_path / "alone"
  train_and_evaluate(tiny_config(**settings, seed=1), alone)
  np.testing.assert_allclose(
    curve(group.folders[1]), curve(alone), rtol=0, atol=1e-5
  )


def test_finished_members_are_only_reported(together, monkeypatch):
  monkeypatch.setattr(loop, "build_run", None)
  configs, folders, results = together
  assert train_members(configs, folders) == results
  assert train_and_evaluate(configs[2], folders[2]) == results[2]


def test_a_group_killed_between_two_saves_goes_on_to_the_same_bits(
  together, stop_at, tmp_path, monkeypatch
):
  """Those that are a save ahead go back to where all can stand."""
  stop_at(14)
  with pytest.raises(Interrupted, match="saved at step .* of 30"):
    train(together.configs, tmp_path)
  monkeypatch.undo()
  (last,) = (tmp_path / "1" / "checkpoints").glob("1[1-9]")
  shutil.rmtree(last)
  again = train(together.configs, tmp_path)
  for folder, whole in zip(again.folders, together.folders, strict=True):
    assert_same_bits(folder, whole)


def test_a_member_goes_on_alone(
  together, finished, stop_at, tmp_path, monkeypatch
):
  stop_at(14)
  with pytest.raises(Interrupted):
    train(together.configs, tmp_path)
  monkeypatch.undo()
  result = train_and_evaluate(finished.config, tmp_path / "0")
  assert result["members"] == 1
  assert_alike(tmp_path / "0", finished.folder)
  train(together.configs, tmp_path)  # the others go on where they stood
  assert_alike(tmp_path / "1", together.folders[1])


def broken(config):
  config = config.copy_and_resolve_references()
  config.optim.head_lr = 1e38
  return config


@pytest.mark.parametrize("step", [None, 14])
def test_a_members_nan_is_its_own(
  step, together, stop_at, tmp_path, monkeypatch, capsys
):
  """`step`: with an interruption after the failure."""
  configs = [*together.configs[:2], broken(together.configs[2])]
  if step:
    stop_at(step)
    with pytest.raises(Interrupted):
      train(configs, tmp_path)
    monkeypatch.undo()
  again = train(configs, tmp_path)
  for folder, whole in zip(again.folders[:2], together.folders, strict=False):
    assert_same_bits(folder, whole)
  failure = again.results[2]
  assert failure["seed"] == 2 and 1 <= failure["step"] < 10
  assert "No checkpoint was saved yet" in failure["failed"]
  left = again.folders[2]
  assert json.loads((left / "failed.json").read_text()) == failure
  assert not (left / "result.json").exists()
  assert failure["failed"] in capsys.readouterr().err
  with pytest.raises(UserError) as caught:  # what the run alone says
    train_and_evaluate(configs[2], left)
  assert str(caught.value) == failure["failed"]
  assert json.loads((left / "failed.json").read_text()) == failure


def test_all_may_fail(tiny_config, tmp_path):
  configs = [broken(tiny_config(seed=seed)) for seed in range(3)]
  assert all("failed" in r for r in train(configs, tmp_path).results)


def test_each_stops_early_by_itself(
  tiny_config, stop_at, tmp_path, monkeypatch
):
  """One that learns nothing stops; the other's program shrinks then.

  The score is a correlation, which the other raises in its second epoch.
  """
  settings = {"optim__patience": 2, "optim__epochs": 4}
  still = {"optim__adapter_lr": 0.0, "optim__head_lr": 0.0}
  configs = [
    tiny_config("stsb", **settings, **still),
    tiny_config("stsb", **settings, seed=2),
  ]
  whole = train(configs, tmp_path / "whole")
  stopped, other = whole.results
  assert stopped["stopped_early"] and len(stopped["history"]) == 3
  assert stopped["best"]["epoch"] == 1 and stopped["members"] == 2
  assert not other["stopped_early"] and len(other["history"]) == 4
  assert other["best"]["epoch"] == 2 and other["members"] == 1
  train_and_evaluate(configs[0], tmp_path / "alone")
  assert_alike(whole.folders[0], tmp_path / "alone")
  stop_at(35)
  with pytest.raises(Interrupted):
    train(configs, tmp_path / "again")
  assert (tmp_path / "again" / "0" / "result.json").exists()
  monkeypatch.undo()
  again = train(configs, tmp_path / "again")
  for folder, same in zip(again.folders, whole.folders, strict=True):
    assert_same_bits(folder, same)


def test_runs_that_fit_together_have_one_key(tiny_config):
  key = group_key(tiny_config())
  assert key == group_key(tiny_config(**OTHER, log__every=5, vera__lr=0.5))
  others = [
    {"vera__rank": 4},
    {"vera__projection_seed": 1},
    {"optim__warmup_ratio": 0.5},
    {"optim__patience": 3},
    {"data__subset_seed": 1},
    {"method": "lora"},
  ]
  keys = [group_key(tiny_config(**changes)) for changes in others]
  assert len({key, *keys}) == 1 + len(others)
  # trained alone, b counts d as a constant of the program
  only_b = {"vera__train": "b"}
  assert group_key(tiny_config(**only_b)) != group_key(
    tiny_config(**only_b, vera__d_init=0.5)
  )


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"vera__rank": 4, "seed": 1}, "vera.rank. Runs .* may differ in .*seed"),
    ({"vera__projection_seed": 1}, "vera.projection_seed"),
    ({"optim__epochs": 2, "task": "cola"}, "optim.epochs, task"),
    ({}, "Two members are the same run"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(
  changes, words, tiny_config, tmp_path
):
  with pytest.raises(UserError, match=words):
    train([tiny_config(), tiny_config(**changes)], tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_members_name_is_what_differs(tiny_config):
  assert titles([tiny_config(seed=3)]) == ["seed 3"]
  assert titles([tiny_config(seed=s) for s in (0, 1)]) == ["seed 0", "seed 1"]
  two = [tiny_config(), tiny_config(seed=1, optim__head_lr=None)]
  assert titles(two) == ["seed 0, head_lr 0.05", "seed 1"]


def test_a_folder_for_each(tiny_config, tmp_path):
  configs = [tiny_config(), tiny_config(seed=1)]
  with pytest.raises(UserError, match="workdir of its own"):
    train_members(configs, [tmp_path, tmp_path])


def test_the_norms_in_a_result_are_those_of_its_adapter(together):
  for folder, result in zip(together.folders, together.results, strict=True):
    assert result["norms"] == norms_beside(folder)
    assert {v["leaf"] for v in result["norms"]} == {"d", "b"}
    assert len(result["norms"]) == 2 * 2 * 2  # layers, query and value
