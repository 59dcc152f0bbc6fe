"""The short form of `python -m tests.growth`: nothing is lost at each turn."""

import pytest

from tests.growth.programs import PROGRAMS
from tests.growth.samples import HELD, MOST, Sample, growth, measure

SHORT = 0.1  # by which memory may grow: caches fill in the first minute


def test_growth_is_that_of_the_second_half():
  values = [100, 50, 60, 70, *range(110, 115)]  # it begins with what it loads
  samples = [Sample(done, value, 7, 3) for done, value in enumerate(values)]
  assert growth(samples, "memory") == pytest.approx(114 / 110 - 1)
  samples[-1] = samples[-1]._replace(files=9)
  assert growth(samples, "files") == pytest.approx(0)
  leaking = [Sample(done, 100, 4 + done // 4, 3) for done in range(25)]
  assert growth(leaking, "files") > MOST


@pytest.mark.slow
def test_a_short_run_grows_no_more(tmp_path):
  row = measure(tmp_path / "run", PROGRAMS["predicting"], scale=0.25)
  most = dict.fromkeys(HELD, MOST) | {"memory": SHORT}
  assert all(row["growth"][held] <= most[held] for held in HELD), row
