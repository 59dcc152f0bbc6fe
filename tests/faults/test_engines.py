"""Sweeps by engines that lose jobs and nodes, in short."""

import json
import signal
from contextlib import ExitStack

import pytest

from tests.faults import engines
from tests.faults.fixtures import last_step, saves, wait_until

pytestmark = pytest.mark.slow

# Ray starts a cluster's nodes in this process, by fork, and jax warns of that.
forks = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:os.fork:RuntimeWarning",
)


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
