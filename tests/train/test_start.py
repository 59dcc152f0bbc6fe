import subprocess
import sys
import time

import pytest

from vera_jax.train.start import (
  begin,
  count_from_process_start,
)

CODE = """
import time
time.sleep(0.5)
from vera_jax.train.start import since_start
print(since_start())
"""


@pytest.mark.slow
def test_the_time_before_the_import_counts():
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  # the kernel counts in hundredths
  assert 0.49 < float(done.stdout) < time.monotonic() - started + 0.02


def test_one_run_takes_the_commands_time():
  before = time.monotonic()
  count_from_process_start()
  first, second = begin(), begin()
  assert first < before <= second <= time.monotonic()
