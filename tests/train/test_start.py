import os
import subprocess
import sys
import time

from vera_jax.train.start import since_start

CODE = """
import time
time.sleep(0.5)
from vera_jax.train.start import since_start
print(since_start())
"""


def test_the_time_before_the_import_counts():
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  # the kernel counts in hundredths
  assert 0.49 < float(done.stdout) < time.monotonic() - started + 0.02


def test_time_goes_on():
  one = since_start()
  time.sleep(0.05)
  assert 0 < one < since_start()


CACHES = """
import os
import jax
from vera_jax.train.loop import use_compilation_cache
use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path):
  def caches(**chosen):
    mine = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    done = subprocess.run(
      [sys.executable, "-c", CACHES],
      capture_output=True,
      text=True,
      check=True,
      env={**mine, "HOME": str(tmp_path), **chosen},
    )
    return done.stdout.split()

  assert caches() == [str(tmp_path / ".cache/vera_jax/xla"), "0"]
  chosen = {
    "JAX_COMPILATION_CACHE_DIR": "/elsewhere",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2",
  }
  assert caches(**chosen) == ["/elsewhere", "2.0"]
