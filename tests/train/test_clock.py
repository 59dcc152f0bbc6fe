"""Times by a clock that the tests turn: every second belongs to one part."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vera_jax.train.clock import PARTS, Clock, Speed, sentence, with_result
from vera_jax.train.flops import PEAK, flops_of, peak_of

STEP, WAIT = 2.0, 0.5  # seconds of a step, and of waiting for its batch


class Program:
  """A process with a clock of its own, that began at this Unix time."""

  def __init__(self, at, earlier=(), *, since=None, peak=None):
    self.began, self.time = at, at
    self.clock = Clock(0.0, now=lambda: self.time - at, wall=lambda: self.time)
    self.speed = Speed(self.clock, dict(earlier), since=since or at, peak=peak)

  def spend(self, part, seconds):
    self.time += seconds
    self.clock.took(part)

  def train(self, first, steps, *, ends=(), every=10, ahead=True):
    """Metrics by step, in the order in which the loop does things.

    With `ahead` a device works by itself and the host waits for the step
    before; otherwise a step is over when its call returns.
    """
    unread, written = [], {}
    self.spend("start", 5.0)

    def read():
      for step in unread:
        if ahead:  # the device was busy with it until now
          self.time += STEP
        self.speed.record(tokens=100.0, flops=1e12)
        if step % every == 0:
          written[step] = self.speed.metrics()
      unread.clear()

    for step in range(first, steps + 1):
      if not ahead:
        self.spend("start" if step == first else "data", WAIT)
        self.time += STEP
      read()
      unread.append(step)
      if step == first:
        read()
        self.spend("compiling", 20.0)
      self.clock.took("steps")
      if step in ends:
        read()
        self.clock.took("steps")
        self.spend("evaluation", 30.0)
        self.spend("saving", 1.0)
    return written


def whole(seconds):
  return sum(seconds.values())


def test_the_parts_add_up_to_the_whole():
  program, draw = Program(1000.0), random.Random(0)
  for _ in range(100):
    program.spend(draw.choice(PARTS), draw.random())
  report = program.speed.report()
  assert whole(report["seconds"]) == pytest.approx(program.time - 1000.0)
  share = report["seconds"]["steps"] / whole(report["seconds"])
  assert report["goodput"] == pytest.approx(share)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_takes_what_it_takes_beside_evaluations_too(ahead):
  program = Program(0.0, peak=4e12)
  written = program.train(1, 100, ends=(30, 55, 100), ahead=ahead)
  wait = 0 if ahead else WAIT
  each = STEP + wait
  assert sorted(written) == list(range(10, 101, 10))
  for values in written.values():
    # at an evaluation one wait of ten falls on the other side
    seconds = values["speed/step_seconds"]
    assert seconds == pytest.approx(each, abs=wait / 8)
    assert values["speed/tokens_per_second"] == pytest.approx(100 / seconds)
    assert values["speed/flops_per_second"] == pytest.approx(1e12 / seconds)
    assert values["speed/mfu"] == pytest.approx(1 / seconds / 4)
    waited = values["speed/data_wait"] * seconds
    assert waited == pytest.approx(wait, abs=wait / 8)
  report = program.speed.report()
  assert report["step_seconds"] == pytest.approx(each)
  assert report["seconds"]["evaluation"] == 3 * 30.0
  assert report["seconds"]["steps"] == pytest.approx(99 * STEP)


def test_what_is_not_known_is_left_out():
  program = Program(0.0)
  program.spend("compiling", 1.0)
  assert program.speed.report().keys() == {"starts", "goodput", "seconds"}
  for _ in range(3):
    program.spend("steps", 1.0)
    program.speed.record(tokens=0.0, flops=1.0)
  (*_, last) = [program.speed.metrics(), program.speed.metrics()]
  assert last == {}  # no step since
  rates = {"step_seconds", "data_wait", "flops_per_second"}
  assert program.speed.report().keys() - {"starts", "goodput"} == {
    *rates,
    "seconds",
  }


def test_steps_that_were_lost_and_the_time_between_are_no_goodput():
  """Killed 40 s after its save; begun again 60 s later, trained to the end."""
  first = Program(1000.0)
  first.train(1, 50, ends=(50,))
  saved = first.speed.report()
  steps = saved["seconds"]["steps"]
  first.spend("steps", 40.0)  # of no save
  second = Program(first.time + 60.0, saved, since=1000.0)
  second.train(51, 100, ends=(100,))
  report = second.speed.report()
  assert report["starts"] == 2
  assert report["seconds"]["lost"] == pytest.approx(100.0)
  assert whole(report["seconds"]) == pytest.approx(second.time - 1000.0)
  assert report["seconds"]["steps"] == pytest.approx(steps + 49 * STEP)
  share = report["seconds"]["steps"] / (second.time - 1000.0)
  assert report["goodput"] == pytest.approx(share)
  # the run's last part, with which the share falls
  end = with_result(report, 50.0)
  assert whole(end["seconds"]) == pytest.approx(second.time + 50.0 - 1000.0)
  assert end["goodput"] < report["goodput"]


def test_a_process_that_was_killed_before_any_save_is_lost():
  second = Program(1500.0, since=1000.0)
  assert second.speed.report()["seconds"]["lost"] == 500.0


def test_a_line_for_a_person():
  program = Program(0.0, peak=1e12)
  program.train(1, 20, ends=(20,))
  assert sentence(program.speed.report()) == (
    "2 s per step, 50 tokens per second, 50% of the chips' peak, goodput 40%"
  )


def count(function, *arrays):
  return flops_of(jax.make_jaxpr(function)(*arrays).jaxpr)


def test_products_are_counted_as_xla_counts_them():
  x, w = jnp.ones((4, 8, 16)), jnp.ones((16, 32))
  image, kernel = jnp.ones((2, 10, 10, 6)), jnp.ones((3, 3, 3, 8))

  def convolve(image, kernel):
    return jax.lax.conv_general_dilated(
      *(image, kernel, (1, 1), "VALID"),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=2,
    )

  for function, arrays, by_hand in (
    (lambda x, w: x @ w, (x, w), 2 * 4 * 8 * 16 * 32),
    (convolve, (image, kernel), 2 * (2 * 8 * 8 * 8) * (3 * 3 * 3)),
  ):
    counted = jax.jit(function).lower(*arrays).compile().cost_analysis()
    assert count(function, *arrays) == by_hand
    assert counted["flops"] == pytest.approx(by_hand, rel=0.01)


def test_a_loop_counts_as_often_as_it_turns():
  """Which XLA's own count does not; and in gradients, batches and branches."""
  kernels, x = jnp.ones((5, 16, 16)), jnp.ones((4, 16))

  def looped(kernels, x):
    for kernel in kernels:
      x = jnp.tanh(x @ kernel)
    return x.sum()

  def stacked(kernels, x):
    body = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None))
    return jax.lax.scan(body, x, kernels)[0].sum()

  one = 2 * 4 * 16 * 16
  assert count(looped, kernels, x) == count(stacked, kernels, x) == 5 * one
  # the products again (remat), and for each two gradients
  assert count(jax.grad(stacked), kernels, x) == 5 * one + 5 * 3 * one
  many = jax.vmap(jax.jit(looped), in_axes=(None, 0))
  assert count(many, kernels, jnp.ones((3, 4, 16))) == 3 * 5 * one

  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x.T, lambda: 2 * x @ x.T)

  assert count(branch, x) == 2 * 4 * 4 * 16


def test_the_peak_of_a_chip_in_no_table_is_unknown():
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  assert peak_of(mesh) is None
  assert all(1e13 < peak < 1e16 for peak in PEAK.values())
  assert np.unique(list(PEAK)).size == len(PEAK)
