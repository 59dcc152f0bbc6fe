"""Traces of the steps that are named, and of no others."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.train.profile import Profile, steps_in
from vera_jax.train.workdir import first_start


def traced(folder, steps):
  """The steps that a run's trace has, in order."""
  files = folder / "profile" / "plugins" / "profile" / f"steps-{steps}"
  assert (files / "process0.trace.json.gz").read_bytes()
  trace = (files / "process0.xplane.pb").read_bytes()
  data = ProfileData.from_serialized_xspace(trace)
  events = [e for p in data.planes for line in p.lines for e in line.events]
  return sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")


def train(folder, steps, numbers, end=9):
  with Profile(steps, folder, end) as profile:
    for number in numbers:
      with profile.step(number):
        jax.jit(jnp.tanh)(jnp.ones(3)).block_until_ready()
      if profile.is_last(number):
        profile.stop()


def test_the_steps_asked_for_are_traced(tmp_path):
  train(tmp_path, "2:4", range(1, 10))
  assert traced(tmp_path, "2-4") == [2, 3, 4]


def test_a_store_has_the_trace_and_the_first_start(bucket):
  folder = place(f"{bucket}/profiled")
  train(folder, "2:4", range(1, 10))
  assert traced(folder, "2-4") == [2, 3, 4]
  assert [first_start(folder, now) for now in (1.5, 2.5)] == [1.5, 1.5]


@pytest.mark.parametrize("numbers", [range(3, 10), range(1, 4), range(3, 4)])
def test_those_of_them_that_are_trained_are(numbers, tmp_path):
  """By a run that was resumed amid them, or that ends there."""
  train(tmp_path, "2:4", numbers)
  assert traced(tmp_path, "2-4") == [n for n in numbers if n in (2, 3, 4)]


@pytest.mark.parametrize("steps, numbers", [("", [1, 2]), ("2:4", [5, 6])])
def test_no_trace_where_there_is_nothing_to_trace(steps, numbers, tmp_path):
  train(tmp_path, steps, numbers)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["10", "10-15", "15:10", "0:3", "2:", "a:b"])
def test_what_is_no_range_is_refused(text):
  with pytest.raises(UserError, match="as in --profile=10:15"):
    steps_in(text)


def test_steps_beyond_the_runs_own_are_refused(tmp_path):
  assert Profile("9:9", tmp_path, 9)
  with pytest.raises(UserError, match="2:10 names steps .*: it has 9"):
    Profile("2:10", tmp_path, 9)
