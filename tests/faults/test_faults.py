"""The short form of `python -m tests.faults.run`: real processes, few faults.

All tests share one config and one run left alone.
"""

import json
import signal
from contextlib import ExitStack

import pytest

from configs import quickstart
from tests.faults import engines, interruption, stores
from tests.faults.fixtures import (
  Launcher,
  last_step,
  lines,
  reach,
  saves,
  wait_until,
)
from tests.faults.processes import largest_difference
from vera_jax.train.loop import train_and_evaluate

pytestmark = pytest.mark.slow

# Ray starts a cluster's nodes in this process, by fork, and jax warns of that.
forks = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:os.fork:RuntimeWarning",
)
CLOSE = 1e-5  # losses of about 0.7, where sums are added in another order


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Launcher:
  folder = tmp_path_factory.mktemp("faults")
  return Launcher(folder, epochs=3, dropout=False)


@pytest.fixture(scope="module")
def alone(launcher):
  return launcher.run_alone()


def test_killed_in_a_save(launcher, alone):
  """The second one: the run goes on from the first."""
  outcome = interruption.kills(launcher, alone, times=1, seed=0)
  assert outcome.tried == 1 and outcome.lost == 0 and outcome.same


@pytest.mark.slow
def test_killed_in_a_store(launcher, alone, store):
  outcome = stores.kills(launcher, alone, store, times=2, seed=1)
  assert outcome.tried == 2 and outcome.lost == 0 and outcome.same


@pytest.mark.slow
@pytest.mark.parametrize("name", stores.BAD)
def test_a_bad_store(name, launcher, alone, store, monkeypatch):
  # docs/faults.md has half a second for each answer
  monkeypatch.setitem(stores.BAD, "slow answers", {"slow": 0.1})
  assert stores.bad_store(launcher, alone, store, name).lost == 0


@pytest.mark.slow
def test_a_sweep_killed_in_a_store(launcher, store):
  outcome = stores.sweep_kills(launcher, store, times=1, seed=1)
  assert outcome.tried == 1 and outcome.lost == 0 and outcome.same


@pytest.mark.slow
def test_eight_processes_want_the_same_locks(store):
  assert stores.claimants(store, locks=10).lost == 0


@pytest.mark.slow
def test_two_processes_are_one(launcher, alone):
  """Two of four devices = one of eight = one of one, stopped on the way.

  SIGTERM comes to the second process alone; both save at the same step. Then
  the two are started as SLURM does.
  """
  two, eight = launcher.folder / "two", launcher.folder / "eight"
  processes = launcher.start_several(two, **{"log.profile": "2:4"})
  assert reach(two, 13, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stops = [process.end() for process in processes]
  assert [stop.code for stop in stops] == [75, 75], stops[0].output
  step = saves(two)[-1]
  assert step >= 13 and not (two / "result.json").exists()
  for stop in stops:
    assert f"Stopped by SIGTERM, saved at step {step} of 30" in stop.output
  assert "epoch 1 of 3" in stops[0].output and "epoch" not in stops[1].output

  # each traces itself, and the first alone writes metrics
  traces = (two / "profile").rglob("*.xplane.pb")
  assert {x.name[:8] for x in traces} == {"process0", "process1"}
  assert len(list((two / "tensorboard").iterdir())) == 1
  assert [x["step"] for x in lines(two) if "loss" in x] == [*range(1, step + 1)]

  first, second = launcher.run_several(two, slurm=True)
  assert (first.code, second.code) == (0, 0), first.output
  assert f"resumed at step {step} of 30" in first.output
  assert "best epoch" in first.output and "best epoch" not in second.output

  config = quickstart.get_config()
  paths = ("model.name", "data.source", "data.cache_dir")
  as_text = {name: str(launcher.settings[name]) for name in paths}
  config.update_from_flattened_dict({**launcher.settings, **as_text})
  result = train_and_evaluate(config, eight)
  assert result["device"] == {**result["device"], "count": 8, "processes": 1}
  assert largest_difference(two, eight) < CLOSE
  assert largest_difference(two, alone) < CLOSE


def test_jobs_of_a_sweep_are_lost_and_preempted(launcher):
  pytest.importorskip("submitit")
  sweep = "tests/faults/sweep.py:1"
  outcome = engines.by_submitit(launcher, times=1, sweep=sweep)
  assert outcome.lost == 0 and outcome.same


@forks
def test_nodes_of_a_sweep_are_lost(launcher):
  pytest.importorskip("ray")
  sweep = "tests/faults/sweep.py:2"
  outcome = engines.by_ray(launcher, times=1, sweep=sweep, members=1)
  assert outcome.lost == 0 and outcome.same


@forks
@pytest.mark.parametrize("name", ["local", "submitit", "ray"])
def test_each_launcher_starts_a_process_per_host(launcher, name):
  workdir = launcher.folder / f"hosts-{name}"
  flags = ["--hosts=2", "--config.base.method=vera"]
  with ExitStack() as stack:
    if name == "submitit":
      pytest.importorskip("submitit")
      flags += ["--launcher=slurm", "--launcher_options=cluster=local"]
    if name == "ray":
      pytest.importorskip("ray")
      ray, _ = stack.enter_context(engines.cluster(launcher, nodes=2))
      flags += ["--launcher=ray", f"--launcher_options=address={ray.address}"]
    ended = launcher.run(workdir, *flags, sweep="tests/faults/sweep.py:1")
  assert ended.code == 0, ended.output
  (file,) = workdir.glob("runs/*/result.json")
  device = json.loads(file.read_text())["device"]
  assert device == {**device, "count": 2, "processes": 2}


def test_a_stopped_sweep_has_what_ray_trains_saved(launcher):
  pytest.importorskip("ray")
  workdir = launcher.folder / "stopped-ray"
  flags = ["--launcher=ray", "--config.base.method=vera"]
  sweep = launcher.start(workdir, *flags, sweep="tests/faults/sweep.py:1")
  assert wait_until(
    lambda: any(last_step(run) >= 13 for run in workdir.glob("runs/*")), sweep
  )
  sweep.send_signal(signal.SIGTERM)
  ended = sweep.end()
  assert ended.code == 75 and "had to save" in ended.output, ended.output
  (run,) = workdir.glob("runs/*")
  assert saves(run)[-1] >= 13  # epochs end at 10, 20 and 30
  assert not any(workdir.glob("locks/*"))
