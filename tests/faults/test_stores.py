"""Runs and sweeps in a store, in short.

`python -m tests.faults.run --only=store` is the long form.
"""

import pytest

from tests.faults import stores

pytestmark = pytest.mark.slow


def test_killed_in_a_store(launcher, alone, store):
  outcome = stores.kills(launcher, alone, store, times=1, seed=1)
  assert outcome.tried == 1 and outcome.lost == 0 and outcome.same


def test_a_bad_store(launcher, alone, store):
  """Slow answers are in the long form alone: they take minutes."""
  name = "errors and lost answers"
  assert stores.bad_store(launcher, alone, store, name).lost == 0


def test_a_sweep_killed_in_a_store(launcher, store):
  outcome = stores.sweep_kills(launcher, store, times=1, seed=1, seeds=2)
  assert outcome.tried == 1 and outcome.lost == 0 and outcome.same


def test_eight_processes_want_the_same_locks(store):
  assert stores.claimants(store, locks=10).lost == 0
