"""Runs split over devices: each is what it is alone, in one of the parts."""

import math
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.plans.collectives import collectives
from experiments.plans.figures import total
from experiments.plans.lowering import abstract_step
from tests.faults.fixtures import Launcher, reach
from tests.train.test_ensemble import (
  assert_alike,
  broken,
  curve,
  result_of,
  train,
)
from tests.train.test_shards import QUIET, config_of
from tests.untimed import untimed_metrics
from vera_jax.errors import UserError
from vera_jax.pretrained.sharding import Together, make_mesh, split_runs
from vera_jax.train import setup
from vera_jax.train.loop import train_and_evaluate
from vera_jax.train.preemption import Interrupted

# split by themselves; one shape of microbatches, whoever else is there
SAME = {"mesh__runs": -1, "optim__microbatch_rows": 1, "optim__epochs": 2}


def devices(monkeypatch, count):
  """Setups have so many devices from here on."""

  def mesh(**options):
    return make_mesh(**options, over=jax.devices()[:count])

  monkeypatch.setattr(setup, "make_mesh", mesh)


def assert_same_training(folder, other):
  """To the last bit; what is said of the others in the ensemble may differ."""
  name = "adapter/adapter.safetensors"
  assert (folder / name).read_bytes() == (other / name).read_bytes()
  assert untimed_metrics(folder) == untimed_metrics(other)
  one, two = map(result_of, (folder, other))
  for result in (one, two):
    del result["members"], result["device"], result["config"]["mesh"]
  assert one == two


def compiled(mesh, runs):
  config = config_of("vera")
  step = abstract_step(
    config, QUIET, mesh, dtype=jnp.dtype("float32"), runs=runs
  )
  return step.compile(rows=8, length=8, slots=2)


def test_eight_devices_send_each_other_nothing():
  """And each has the memory and the FLOPs of a run on one device."""
  alone = compiled(make_mesh(over=jax.devices()[:1]), None)
  eight = compiled(make_mesh(runs=8), 8)
  assert not collectives(eight.as_text())
  one, each = (program.cost_analysis()["flops"] for program in (alone, eight))
  assert each == pytest.approx(one, rel=0.01)
  assert held(eight) <= 1.01 * held(alone)


def held(program):
  """Bytes of arguments, results and temporaries on a device."""
  code = program.memory_analysis().generated_code_size_in_bytes
  return total(program) - code


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": 2},
    pytest.param({"data": 4}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_what_is_sent_stays_within_a_part(sizes):
  """Two parts, of two runs each: the first four devices, and the others."""
  text = compiled(make_mesh(**{"data": 1, **sizes}, runs=2), 4).as_text()
  assert collectives(text)
  groups = [*device_groups(text)]
  assert groups and all(len({i // 4 for i in each}) == 1 for each in groups)


def device_groups(text):
  """The devices that a program's collectives are between."""
  listed = r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}"
  for groups in re.findall(listed, text):
    for one in re.findall(r"\{([\d,]+)\}", groups):
      yield [int(i) for i in one.split(",")]
  named = r"replica_groups=mesh\[(.*?)\] \{(.*?)\}"
  for axes, over in re.findall(named, text):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    order = [i for i, name in enumerate(sizes) if f"'{name}'" in over]
    last = range(-len(order), 0)
    many = math.prod(ids.shape[i] for i in order)
    yield from np.moveaxis(ids, order, last).reshape(-1, many).tolist()
  counted = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  for numbers in re.findall(counted, text):
    shape, sizes, order = (
      [int(i) for i in each.split(",") if i] for each in numbers
    )
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    yield from ids.transpose(order or None).reshape(shape).tolist()


@pytest.mark.slow
def test_a_runs_bits_are_its_own(tiny_config, tmp_path, monkeypatch):
  """One run on a device: eight on eight, two on two, one beside seven idle
  parts; and to rounding the run alone, for which XLA fuses otherwise."""
  configs = [tiny_config(**SAME, seed=seed) for seed in range(8)]
  eight = train(configs, tmp_path / "eight").folders[5]
  sixth = configs[5].copy_and_resolve_references()
  sixth.mesh.runs = 8
  alone = train([sixth], tmp_path / "alone").folders[0]
  assert_same_training(eight, alone)
  devices(monkeypatch, 2)
  two = train(configs[4:6], tmp_path / "two").folders[1]
  assert_same_training(eight, two)
  devices(monkeypatch, 1)
  train_and_evaluate(configs[5], tmp_path / "one")
  assert_alike(eight, tmp_path / "one")


@pytest.mark.slow
def test_an_idle_part_is_for_the_next_run(
  tiny_config, tmp_path, stop_at, monkeypatch
):
  """Six runs, three at once, on four devices. The fourth has the part that is
  left over, the fifth that of the second, which fails; stopped meanwhile."""
  devices(monkeypatch, 4)
  settings = {**SAME, "mesh__runs": 4}
  six = [tiny_config(**settings, seed=seed) for seed in range(6)]
  four = [*six[:1], *six[2:4], six[4]]
  six[1] = broken(six[1])
  stop_at(14)
  with pytest.raises(Interrupted, match="saved at step 15 of 40"):
    train(six, tmp_path / "queue", members=3)
  monkeypatch.undo()
  devices(monkeypatch, 4)
  queue = train(six, tmp_path / "queue", members=3)
  assert "failed" in queue.results[1]
  apart = train(four, tmp_path / "apart")
  for number, folder in zip((0, 2, 3, 4), apart.folders, strict=True):
    assert_same_training(queue.folders[number], folder)
  assert [e["step"] for e in queue.results[5]["history"]] == [10, 20]


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes", [{"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}]
)
def test_parts_of_several_devices(sizes, tiny_config, quiet_model, tmp_path):
  """Three runs, two on one part and one on the other; here all is trained.

  Without dropout, whose masks depend on the mesh.
  """
  settings = {
    "method": "full",
    "optim__epochs": 1,
    "model__name": str(quiet_model),
  }
  mesh = {f"mesh__{axis}": size for axis, size in {"runs": 2, **sizes}.items()}
  three = [tiny_config(**settings, **mesh, seed=seed) for seed in range(3)]
  folders = train(three, tmp_path).folders
  for seed in (1, 2):
    alone = tmp_path / "alone" / str(seed)
    train_and_evaluate(tiny_config(**settings, seed=seed), alone)
    np.testing.assert_allclose(
      curve(folders[seed]), curve(alone), rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_resumed_on_other_devices(tiny_config, tmp_path, stop_at, monkeypatch):
  """Eight runs stopped on eight devices go on on two, four on each; and on
  eight to the same bits."""
  configs = [tiny_config(**SAME, seed=seed) for seed in range(8)]
  whole = train(configs, tmp_path / "whole")
  for count in (8, 2):
    folder = tmp_path / str(count)
    stop_at(14)
    with pytest.raises(Interrupted, match="saved at step"):
      train(configs, folder)
    monkeypatch.undo()
    if count == 8:
      again = train(configs, folder)
      for one, other in zip(again.folders, whole.folders, strict=True):
        assert_same_training(one, other)
      continue
    devices(monkeypatch, count)
    again = train(configs, folder)
    for one, other in zip(again.folders, whole.folders, strict=True):
      assert_alike(one, other)


@pytest.mark.slow
def test_two_hosts_with_two_runs_each(tmp_path):
  """And one that waits. To the bits of one process with four devices; stopped
  by one of them, and resumed."""
  launcher = Launcher(tmp_path, epochs=2)
  seeds = "--seeds=0,1,2,3,4", "--members=4"
  hosts, whole = tmp_path / "hosts", tmp_path / "whole"
  processes = launcher.start_several(hosts, *seeds, devices=2)
  assert reach(hosts / "seed0", 13, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stops = [process.end() for process in processes]
  assert [stop.code for stop in stops] == [75, 75], stops[0].output
  for ended in (
    *launcher.run_several(hosts, *seeds, devices=2),
    launcher.run(whole, *seeds, devices=4),
  ):
    assert ended.code == 0, ended.output
  assert "split into 4 parts, of 1 device each" in stops[0].output
  for seed in range(5):
    assert_same_training(hosts / f"seed{seed}", whole / f"seed{seed}")


@pytest.mark.smoke
@pytest.mark.parametrize(
  "together, sizes, runs",
  [
    # runs, rows of a step; devices, data, fsdp, tensor
    ((8, 64), (8, -1, 1, 1), 8),
    ((40, 64), (8, -1, 1, 1), 8),
    ((5, 64), (8, -1, 1, 1), 1),  # 40 rows a device; with runs=8 they are 64
    ((10, 64), (8, -1, 1, 1), 2),
    ((5, 64), (256, -1, 1, 1), 8),  # more shards than rows would be idle
    ((8, 64), (8, -1, 2, 1), 4),
    ((8, 64), (8, -1, 1, 2), 4),
    ((8, 64), (8, 2, 1, 1), 4),  # what the other axes leave
    ((8, 64), (8, 1, -1, 1), 1),  # fsdp takes what is left over
    ((1, 64), (8, -1, 1, 1), 1),
  ],
)
def test_how_runs_are_split_by_themselves(together, sizes, runs):
  assert split_runs(Together(*together), *sizes) == runs


def test_what_does_not_fit_is_refused(tiny_config, tmp_path):
  both = [tiny_config(mesh__runs=3, seed=seed) for seed in range(2)]
  with pytest.raises(UserError, match="runs=3, data=-1.* the 8 devices"):
    train(both, tmp_path)
  with pytest.raises(UserError, match="mesh.runs=8 splits .* this is one run"):
    train_and_evaluate(tiny_config(mesh__runs=8), tmp_path / "alone")
