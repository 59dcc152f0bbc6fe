"""Runs that train together: each is the run alone, whatever befalls others.

First what the step of several costs, then whole runs.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from tests.train.conftest import here, outputs, random_model, tiny_blueprint
from tests.untimed import untimed_metrics, without_times
from vera_jax import group_key, train_ensemble
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.vector_norms import adapter_norms, as_json
from vera_jax.errors import UserError
from vera_jax.pretrained.blueprint import abstract_model
from vera_jax.pretrained.sharding import behind_runs, make_mesh
from vera_jax.tasks.classification import loss
from vera_jax.train import compiled_step, loop
from vera_jax.train.compiled_step import CompiledStep, state_shape
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.optim import optimiser
from vera_jax.train.preemption import Interrupted
from vera_jax.train.step import Frozen, microbatch_gradient

RATES = {"adapter_lr": 0.01, "head_lr": 0.02, "weight_decay": 0.1}


def shapes(tree, *front):
  """Of arrays that have these axes in front."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((*front, *leaf.shape), leaf.dtype), tree
  )


def batch_shapes(plan, rows, length, slots, *front):
  """A packed microbatch's, by name."""
  batch = plan.family.inputs(rows, length, slots)
  batch["labels"] = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
  batch["weights"] = jax.ShapeDtypeStruct((rows, slots), jnp.float32)
  return shapes(batch, *front)


# MiniLM's widths. No array is made of them.
MINILM = {
  "vocab_size": 30522,
  "hidden_size": 384,
  "num_hidden_layers": 6,
  "num_attention_heads": 12,
  "intermediate_size": 1536,
  "max_position_embeddings": 512,
}


@pytest.mark.slow
def test_eight_runs_need_the_base_once():
  """Peak memory: the base, and eight times a run's own and a tenth at most."""
  mesh = make_mesh(over=jax.devices()[:1])
  model = abstract_model(tiny_blueprint("vera", **MINILM), mesh=mesh)
  frozen = Frozen(model.frozen, model.projections)
  make = partial(optimiser, model.labels, steps=10)
  alone = state_shape(model, make(**RATES), mesh)

  def peak_bytes(*runs):
    """What XLA has of arguments, results and temporaries at once."""
    state = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*runs, *leaf.shape),
        leaf.dtype,
        sharding=behind_runs(leaf.sharding) if runs else leaf.sharding,
      ),
      alone,
    )
    step = CompiledStep(
      state,
      outputs=outputs(model),
      loss=loss,
      optimiser=make,
      runs=runs[0] if runs else None,
    )
    batch = batch_shapes(model.blueprint, 4, 64, 4, *runs)
    key = shapes(jax.eval_shape(lambda: jax.random.key(0)), *runs)
    memory = step.trace(frozen, batch, key).lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes > 0  # the sums are donated
    return (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )

  base = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
  one, eight = peak_bytes(), peak_bytes(8)
  assert base < one < eight
  assert eight <= base + 8 * (one - base) * 1.1


def shapes_in(jaxpr):
  """Of every value, in the bodies of loops and calls too."""
  for equation in jaxpr.eqns:
    yield from (tuple(v.aval.shape) for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from shapes_in(inner)


@pytest.mark.smoke
def test_no_frozen_leaf_gets_an_axis_of_runs():
  """A number of runs that is found nowhere else: no copy for each of seven."""
  runs, sizes = 7, {"vocab_size": 60, "intermediate_size": 48}
  model = random_model("vera", **sizes)
  frozen = Frozen(model.frozen, model.projections)
  gradients = jax.vmap(
    partial(microbatch_gradient, outputs=outputs(model), loss=loss),
    in_axes=(0, None, 0, 0),
  )
  seen = set(
    shapes_in(
      jax.make_jaxpr(gradients)(
        shapes(model.trainable, runs),
        frozen,
        batch_shapes(model.blueprint, 5, 20, 3, runs),
        shapes(jax.random.key(0), runs),
      ).jaxpr
    )
  )
  assert (runs, 8) in seen  # d of a layer, for each
  # The shapes that only frozen leaves have, of a whole stack and of a layer.
  own = set(sizes.values())
  leaves = {leaf.shape for leaf in jax.tree.leaves(frozen.params)}
  wide = {shape for shape in leaves if len(shape) > 1 and own & {*shape[-2:]}}
  assert len(wide) >= 3
  for shape in wide | {shape[-2:] for shape in wide}:
    for at in range(len(shape) + 1):
      assert (*shape[:at], runs, *shape[at:]) not in seen, shape


def test_empty_rows_change_nothing_under_dropout():
  """As packing leaves them where another run needs more rows: each row keeps
  its dropout mask, so loss and gradient are the same to float rounding."""
  model = random_model("vera", dropout=0.3)
  rng = np.random.default_rng(0)
  batch = {
    name: np.ones(leaf.shape, np.int32)
    for name, leaf in batch_shapes(model.blueprint, 3, 8, 1).items()
  }
  batch["input_ids"] = rng.integers(0, 24, (3, 8)).astype(np.int32)
  batch["positions"] = np.tile(np.arange(8, dtype=np.int32), (3, 1))
  batch["cls_positions"] = np.zeros((3, 1), np.int32)
  batch["weights"] = np.ones((3, 1), np.float32)
  padded = {name: np.pad(x, ((0, 5), (0, 0))) for name, x in batch.items()}
  gradient = jax.jit(
    partial(microbatch_gradient, outputs=outputs(model), loss=loss)
  )
  frozen = Frozen(model.frozen, model.projections)

  def summed(batch, key=1):
    return gradient(model.trainable, frozen, here(batch), jax.random.key(key))

  want, got = summed(batch), summed(padded)
  assert got.examples == want.examples == 3
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert abs(summed(batch, key=2).loss - want.loss) > 1e-3  # dropout is on


# What a run may have its own: seed, both rates, weight decay, d_init.
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


class Together(NamedTuple):
  configs: list[ConfigDict]
  folders: list[Path]
  results: list[dict]


def train(configs, folder, **options) -> Together:
  folders = [folder / str(i) for i in range(len(configs))]
  return Together(configs, folders, train_ensemble(configs, folders, **options))


@pytest.fixture(scope="session")
def together(tiny_config, tmp_path_factory) -> Together:
  """Three runs, three epochs, left alone. Look, don't touch."""
  configs = [tiny_config(), tiny_config(**OTHER), tiny_config(seed=2)]
  return train(configs, tmp_path_factory.mktemp("together"))


def read_lines(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def curve(folder):
  lines = read_lines(folder)
  return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def result_of(folder):
  return without_times(json.loads((folder / "result.json").read_text()))


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
  name = "adapter/adapter.safetensors"
  assert (folder / name).read_bytes() == (other / name).read_bytes()
  assert untimed_metrics(folder) == untimed_metrics(other)
  assert result_of(folder) == result_of(other)


def test_seconds_and_flops_are_the_programs_and_tokens_each_runs(together):
  speeds = [result["speed"] for result in together.results]
  for name in ("step_seconds", "flops_per_second", "data_wait"):
    assert len({speed[name] for speed in speeds}) == 1
  assert len({speed["seconds"]["steps"] for speed in speeds}) == 1
  # all have the same texts, but not in the same first step, which is left out
  tokens = [speed["tokens_per_second"] for speed in speeds]
  assert min(tokens) == pytest.approx(max(tokens), rel=0.1)
  lines = [read_lines(folder)[4] for folder in together.folders]
  assert len({line["speed/step_seconds"] for line in lines}) == 1
  assert len({line["speed/tokens_per_second"] for line in lines}) > 1


def test_each_is_the_run_alone(together, finished, tmp_path):
  """The one with settings of its own too."""
  assert_alike(together.folders[0], finished.folder)
  assert together.results[0]["members"] == 3
  assert finished.result["members"] == 1
  names = {path.name for path in finished.folder.iterdir()}
  for folder in together.folders:
    assert {path.name for path in folder.iterdir()} == names
  train_and_evaluate(together.configs[1], tmp_path)
  assert_alike(together.folders[1], tmp_path)
  first = [curve(folder)[0] for folder in together.folders]
  assert len(set(first)) == 3  # seeds and d_init differ from the first step


@pytest.mark.slow
def test_runs_on_a_mesh_of_all_axes(tiny_config, quiet_model, tmp_path):
  """Stacked leaves and slots keep the base's shards; here all are trained.

  Without dropout, whose masks depend on the mesh.
  """
  settings = {
    "method": "full",
    "optim__epochs": 1,
    "model__name": str(quiet_model),
  }
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  both = [tiny_config(**settings, **mesh, seed=seed) for seed in (0, 1)]
  found = train(both, tmp_path)
  alone = tmp_path / "alone"
  result = train_and_evaluate(tiny_config(**settings, seed=1), alone)
  assert result["parameters"]["adapter"] == 5584  # all of the base
  assert result["projection_digest"] is None
  np.testing.assert_allclose(
    curve(found.folders[1]), curve(alone), rtol=0, atol=1e-5
  )


def test_finished_runs_are_only_reported(together, monkeypatch):
  monkeypatch.setattr(loop, "build_setup", None)
  configs, folders, results = together
  assert train_ensemble(configs, folders) == results
  assert train_and_evaluate(configs[2], folders[2]) == results[2]


@pytest.mark.slow
def test_killed_between_two_saves_they_go_on_to_the_same_bits(
  together, finished, stop_at, tmp_path, monkeypatch
):
  """Those that are a save ahead go back to where all can stand.

  In a copy, one goes on alone, and then the others.
  """
  stop_at(14)
  with pytest.raises(Interrupted, match="saved at step .* of 30"):
    train(together.configs, tmp_path / "all")
  monkeypatch.undo()
  apart = shutil.copytree(tmp_path / "all", tmp_path / "apart")
  (last,) = (tmp_path / "all/1/checkpoints").glob("1[1-9]")
  shutil.rmtree(last)
  again = train(together.configs, tmp_path / "all")
  for folder, whole in zip(again.folders, together.folders, strict=True):
    assert_same_bits(folder, whole)
  result = train_and_evaluate(finished.config, apart / "0")
  assert result["members"] == 1
  assert_alike(apart / "0", finished.folder)
  train(together.configs, apart)
  assert_alike(apart / "1", together.folders[1])


def broken(config):
  config = config.copy_and_resolve_references()
  config.optim.head_lr = 1e38
  return config


@pytest.mark.slow
def test_a_runs_nan_is_its_own(
  together, stop_at, tmp_path, monkeypatch, capsys
):
  """With an interruption after the failure."""
  configs = [*together.configs[:2], broken(together.configs[2])]
  stop_at(14)
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


@pytest.mark.slow
def test_all_may_fail(tiny_config, tmp_path):
  configs = [broken(tiny_config(seed=seed)) for seed in range(3)]
  assert all("failed" in r for r in train(configs, tmp_path).results)


@pytest.mark.slow
def test_each_stops_early_by_itself(tiny_config, tmp_path):
  """One that learns nothing stops, and its slot stays, computed and ignored.

  The score is a correlation, which the other raises in its second epoch.
  """
  settings = {"optim__patience": 2, "optim__epochs": 4}
  still = {"optim__adapter_lr": 0.0, "optim__head_lr": 0.0}
  configs = [
    tiny_config("stsb", **settings, **still),
    tiny_config("stsb", **settings, seed=4),
  ]
  whole = train(configs, tmp_path / "whole")
  stopped, other = whole.results
  assert stopped["stopped_early"] and len(stopped["history"]) == 3
  assert stopped["best"]["epoch"] == 1
  assert not other["stopped_early"] and len(other["history"]) == 4
  assert other["best"]["epoch"] == 2
  assert other["best"]["metrics"].keys() == {"pearson", "spearman"}
  assert other["labels"] == [] and other["parameters"]["head"] == 17
  losses = [epoch["train_loss"] for epoch in other["history"]]
  assert losses[-1] < losses[0]
  assert stopped["members"] == other["members"] == 2
  train_and_evaluate(configs[0], tmp_path / "alone")
  assert_alike(whole.folders[0], tmp_path / "alone")


@pytest.fixture(scope="module")
def six(tiny_config) -> list[ConfigDict]:
  """For two slots, all of them with batches of one shape.

  At program step 20 the third begins in the place of the first, which learns
  nothing; at 30 the fourth, which fails, in that of the second; at 40 the fifth
  in its place, and at 50 the sixth in the third's.
  """
  settings = {
    "optim__patience": 1,
    "optim__epochs": 3,
    "optim__microbatch_rows": 8,
  }
  still = {"optim__adapter_lr": 0.0, "optim__head_lr": 0.0}
  rates = {"optim__adapter_lr": 0.01}
  configs = [
    tiny_config("stsb", **settings, **still),
    tiny_config("stsb", **settings, seed=4),
    tiny_config("stsb", **settings, seed=4, **rates),
    broken(tiny_config("stsb", **settings, seed=2)),
    tiny_config("stsb", **settings, seed=5, **still),
    tiny_config("stsb", **settings, seed=6),
  ]
  return configs


@pytest.fixture(scope="module")
def queue(six, tmp_path_factory) -> Together:
  """All six, two at a time; the step is compiled once."""
  traced = []

  def gradient(*arguments, **options):
    traced.append(arguments)
    return microbatch_gradient(*arguments, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compiled_step, "microbatch_gradient", gradient)
    trained = train(six, tmp_path_factory.mktemp("queue"), members=2)
  assert len(traced) == 1
  return trained


@pytest.mark.slow
def test_a_place_is_taken_by_the_next_run(six, queue, tmp_path):
  """Which is to the last bit what it is with nobody before it, in the same
  place of an ensemble of as many; in files, scores and steps of its own."""
  *_, failed, early, last = queue.results
  assert "failed" in failed and 1 <= failed["step"] <= 10
  assert early["stopped_early"] and early["last"]["step"] == 20
  assert [epoch["step"] for epoch in last["history"]][:2] == [10, 20]
  for pair in ((0, 1), (2, 1), (4, 5)):
    apart = train([six[i] for i in pair], tmp_path / str(pair))
    for number, folder in zip(pair, apart.folders, strict=True):
      assert_same_bits(queue.folders[number], folder)


@pytest.mark.slow
def test_stopped_at_steps_of_their_own_they_go_on_to_the_same_bits(
  six, queue, stop_at, tmp_path, monkeypatch
):
  """Stopped while slots stand at steps 5 and 25; in the evaluation at 10 and
  30; and at 25 and 5, where the latter's save is lost: both go back."""
  for step, saved in ((24, 25), (30, 30), (44, 45)):
    stop_at(step)
    with pytest.raises(Interrupted, match=f"saved at step {saved} of"):
      train(six, tmp_path, members=2)
    monkeypatch.undo()
  assert not (tmp_path / "5").exists()  # it has not begun
  assert (tmp_path / "1" / "result.json").exists()  # and this one has ended
  shutil.rmtree(tmp_path / "4" / "checkpoints" / "5")
  again = train(six, tmp_path, members=2)
  for number in (0, 1, 2, 4, 5):
    assert_same_bits(again.folders[number], queue.folders[number])


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
  chain = tiny_config(method="dvora+ia3")
  first = {"vera__d_init": 0.5, "vera__lr": 1.0, "ia3__lr": 1.0}
  assert group_key(chain) == group_key(
    tiny_config(method=chain.method, **first)
  )
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
    ({}, "Two runs of the ensemble are the same"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(
  changes, words, tiny_config, tmp_path
):
  with pytest.raises(UserError, match=words):
    train([tiny_config(), tiny_config(**changes)], tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_folder_for_each(tiny_config, tmp_path):
  configs = [tiny_config(), tiny_config(seed=1)]
  with pytest.raises(UserError, match="workdir of its own"):
    train_ensemble(configs, [tmp_path, tmp_path])


def test_the_norms_in_a_result_are_those_of_its_adapter(together):
  for folder, result in zip(together.folders, together.results, strict=True):
    tensors = load_adapter(folder / "adapter").tensors
    assert result["norms"] == as_json(adapter_norms(tensors))
    assert {v["leaf"] for v in result["norms"]} == {"d", "b"}
    assert len(result["norms"]) == 2 * 2 * 2  # layers, query and value
