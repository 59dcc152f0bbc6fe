"""The short form of `python -m tests.faults.run`: real processes, few faults.

All trials share one config and one run left alone.
"""

import signal

import pytest

from configs import quickstart
from tests.faults import interruption
from tests.faults.ground import Ground, Trial, end, reach, saves
from tests.faults.processes import largest_difference
from tests.faults.run import as_row, page, table
from vera_jax.results import provenance
from vera_jax.train.loop import train_and_evaluate

CLOSE = 1e-5  # losses of about 0.7, where sums are added in another order


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
  folder = tmp_path_factory.mktemp("faults")
  return Ground(folder, epochs=6, dropout=False)


@pytest.fixture(scope="module")
def alone(ground):
  """One process of one device, left alone."""
  folder = ground.folder / "alone"
  ended = ground.run(folder)
  assert ended.code == 0, ended.told
  return folder


def test_killed_at_random_moments_and_in_a_save(ground, alone):
  trial = interruption.kills(ground, alone, times=2, seed=1)
  assert trial.tried == 2 and trial.lost == 0 and trial.same


def test_two_processes_are_one(ground, alone):
  """Two of four devices = one of eight = one of one, stopped on the way.

  SIGTERM comes to the second process alone; both save at the same step. Then
  the two are started as SLURM does.
  """
  two = ground.folder / "two"
  processes = ground.start_several(two)
  assert reach(two, 13, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  stops = [end(process) for process in processes]
  assert [stop.code for stop in stops] == [75, 75], stops[0].told
  step = saves(two)[-1]
  assert step >= 13 and not (two / "result.json").exists()
  for stop in stops:
    assert f"Stopped by SIGTERM, saved at step {step} of 60" in stop.told
  assert "epoch 1 of 6" in stops[0].told and "epoch" not in stops[1].told

  again = [end(process) for process in ground.start_several(two, slurm=True)]
  assert [ended.code for ended in again] == [0, 0], again[0].told
  assert f"resumed at step {step} of 60" in again[0].told
  assert "best epoch" in again[0].told and "best epoch" not in again[1].told

  config = quickstart.get_config()
  settings = {k: _plain(v) for k, v in ground.settings.items()}
  config.update_from_flattened_dict(settings)
  result = train_and_evaluate(config, ground.folder / "eight")
  assert result["device"] == {**result["device"], "count": 8, "processes": 1}
  assert largest_difference(two, ground.folder / "eight") < CLOSE
  assert largest_difference(two, alone) < CLOSE


def _plain(value):
  return value if isinstance(value, int | float) else str(value)


def test_the_table_says_what_was_seen():
  trials = [Trial("a fault", 3, 0, True, "x"), Trial("b", 1, 1, None, "y")]
  rows = [as_row("harm", trial) for trial in trials]
  assert "| a fault | 3 | 0 | yes | x |" in table(rows)
  assert "| b | 1 | 1 | not compared | y |" in table(rows)
  about = {"command": "c", "faults": 4, "cores": 2}
  text = page({**about, "trials": rows, **provenance()})
  assert "4 faults on 2 CPU cores" in text
  assert max(map(len, text.partition("| fault")[0].splitlines())) <= 80
