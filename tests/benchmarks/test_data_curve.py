"""Where two curves of score against data cross."""

import numpy as np
import pytest

from benchmarks import data_curve


def test_a_crossing_lies_on_the_line_between_two_sizes():
  sizes = [32, 128, 512, 2048]
  assert data_curve.crossings(sizes, np.array([-1, -1, 1, 3])) == [256]
  assert data_curve.crossings(sizes, np.array([1, 2, 3, 4])) == []
  both = data_curve.crossings(sizes, np.array([1, -1, -1, 3]))
  assert both == pytest.approx([64, 512 * 4**0.25])


def test_the_interval_holds_the_crossing_and_widens_with_the_seeds():
  """Without spread it is the point; with it, it lies on both sides."""
  exact = {128: [-1.0] * 3, 512: [1.0] * 3}
  assert data_curve.crossing(exact) == "256 (256 to 256 in 100% of the draws)"
  spread = {128: [-1.4, -1.0, -0.6], 512: [0.6, 1.0, 1.4]}
  best, _, rest = data_curve.crossing(spread).partition(" (")
  low, high = (int(x) for x in rest.split(" in ")[0].split(" to "))
  assert best == "256" and 128 <= low < 250 < 262 < high <= 512
  never = {128: [1.0] * 3, 512: [2.0] * 3}
  assert data_curve.crossing(never) == "none"
