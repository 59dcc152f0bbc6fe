"""The start of several processes; what one alone makes of the same calls."""

import jax
import pytest

from vera_jax.errors import UserError
from vera_jax.train import distributed
from vera_jax.train.distributed import initialize, is_launched, on_first
from vera_jax.train.peers import leave

SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
  "given, words",
  [
    (("host:1", None, 0), "Without a value: --num_processes"),
    ((None, 2, None), "Without a value: --coordinator, --process_id"),
    (("host", 2, 0), "give HOST:PORT"),
    (("host:70000", 2, 0), "give HOST:PORT"),
    (("host:12", 2, 2), "numbered from 0 to 1"),
  ],
)
def test_flags_that_do_not_fit(given, words):
  with pytest.raises(UserError, match=words):
    initialize(*given)


def test_alone_nothing_is_started(monkeypatch):
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **_: calls.append(args)
  )
  monkeypatch.setattr(distributed, "is_launched", lambda _: False)
  initialize()
  monkeypatch.setattr(distributed, "is_launched", lambda _: True)
  initialize(num_processes=1)
  assert not calls


def test_processes_that_do_not_come_are_given_up(monkeypatch):
  def refuse(*args, **settings):
    raise RuntimeError("no such host")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  before = jax.config.values["jax_enable_preemption_service"]
  try:
    with pytest.raises(UserError, match="(?s)host:1: no such .*--process_id"):
      initialize("host:1", 2, 1, patience=1.0)
  finally:
    jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
  "environment, launched",
  [
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"JAX_PLATFORMS": "cpu"}, False),
    (SLURM, True),
    ({**SLURM, "JAX_PLATFORMS": "cpu"}, True),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),  # one step of a larger job
    ({"SLURM_JOB_ID": "7", "JAX_PLATFORMS": "cpu"}, False),  # no srun
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a", "TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
  ],
)
def test_what_a_launcher_sets(environment, launched):
  assert is_launched(environment) == launched


def test_one_process_is_the_first_and_waits_for_nobody(monkeypatch):
  acted = []
  on_first(lambda: acted.append(1))
  assert acted == [1] and distributed.is_first()
  with pytest.raises(ZeroDivisionError):
    on_first(lambda: 1 / 0)
  ended = []
  monkeypatch.setattr("os._exit", ended.append)
  leave(1)  # leaves nobody: goes on
  assert not ended
  leave(75)  # a program that is being compiled would be waited for
  assert ended == [75]


def test_a_clock_that_jumps_by_days_ends_no_process(monkeypatch):
  """jax's coordinator goes by the wall clock."""
  given = []

  def start(*args, **options):
    given.append(options)
    raise RuntimeError("enough")

  monkeypatch.setattr(jax.distributed, "initialize", start)
  with pytest.raises(UserError, match="did not come together.*enough"):
    initialize("host:1", 2, 1)
  assert given[0]["heartbeat_timeout_seconds"] > 2 * 86_400
