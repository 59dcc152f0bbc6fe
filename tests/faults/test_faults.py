"""The short form of `python -m tests.faults.run`: real processes, few faults.

All tests of a process share one config and one run left alone; those in stores
and by engines are in files of their own.
"""

import signal

import pytest

from configs import quickstart
from tests.faults import interruption
from tests.faults.fixtures import lines, reach, saves
from tests.faults.processes import largest_difference
from vera_jax.train.loop import train_and_evaluate

pytestmark = pytest.mark.slow

CLOSE = 1e-5  # losses of about 0.7, where sums are added in another order


def test_killed_in_a_save(launcher, alone):
  """The second one: the run goes on from the first."""
  outcome = interruption.kills(launcher, alone, times=1, seed=0)
  assert outcome.tried == 1 and outcome.lost == 0 and outcome.same


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
