"""What a process settles before it trains: memory, compiling, caches."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from vera_jax.data.tokens import _write_cache
from vera_jax.train import runtime
from vera_jax.train.runtime import Background, compiler_options

FAULTS = """
import resource
import numpy as np
from vera_jax.train.runtime import keep_freed_memory

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24, np.float32)  # 64 MiB: 16,384 pages
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def _faults(**environment: str) -> int:
  done = subprocess.run(
    [sys.executable, "-c", FAULTS],
    env={**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_unless_the_user_tuned_the_allocator():
  assert _faults() < 100
  assert _faults(MALLOC_MMAP_THRESHOLD_="65536") > 1000


@pytest.mark.parametrize(
  "device, chosen, want",
  [
    (None, None, "cpu"),
    ("accel0", None, None),
    ("vfio/0", None, None),
    (None, "cuda,cpu", "cuda,cpu"),
  ],
)
def test_libtpu_is_left_alone_where_there_is_no_tpu(
  device, chosen, want, tmp_path, monkeypatch
):
  (tmp_path / "libtpu.py").touch()
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delenv("JAX_FORCE_TPU_INIT", raising=False)
  monkeypatch.setattr(runtime, "entry_points", lambda group: ())
  if device:
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
  before = jax.config.values["jax_platforms"]
  try:
    jax.config.update("jax_platforms", chosen)
    runtime.leave_libtpu_alone(tmp_path)
    assert jax.config.values["jax_platforms"] == want
  finally:
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("cores", [1, 4])
def test_a_program_compiled_in_the_background_is_not_compiled_again(
  cores, monkeypatch
):
  """On one core it is compiled where it is waited for."""
  monkeypatch.setattr(os, "cpu_count", lambda: cores)
  traced = []

  @jax.jit
  def double(x):
    traced.append(x.shape)
    return 2 * x

  programs = Background()
  for size in (2, 3, 2):
    x = jax.ShapeDtypeStruct((size,), jnp.float32)
    programs.compile(size, lambda x=x: double.trace(x))
  assert cores > 1 or not traced
  for size in (2, 3):
    programs.wait(size)
    assert double(jnp.ones(size)).tolist() == [2.0] * size
  assert sorted(traced) == [(2,), (3,)]


def test_an_error_in_the_background_is_raised_where_it_is_waited_for():
  programs = Background()
  programs.compile("bad", lambda: jax.jit(lambda x: x @ x).trace(jnp.ones(3)))
  programs.compile("worse", lambda: jax.jit(jnp.dot).trace(1, "a"))
  programs.wait("bad")
  with pytest.raises(TypeError):
    programs.wait("worse")


def test_the_users_own_optimisation_level_stands(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
  assert compiler_options("cpu") is None
  monkeypatch.setenv("XLA_FLAGS", "")
  assert compiler_options("tpu") is None
  assert compiler_options("cpu") == {"xla_backend_optimization_level": 1}


def test_a_home_that_takes_no_files_is_one_sentence(
  tmp_path, monkeypatch, caplog
):
  home = tmp_path / "home"
  home.write_text("")  # a file: not even root makes folders in it
  monkeypatch.setenv("HOME", str(home))
  unset = SimpleNamespace(
    values={"jax_compilation_cache_dir": None}, update=pytest.fail
  )
  monkeypatch.setattr(runtime, "jax", SimpleNamespace(config=unset))
  runtime.use_compilation_cache()
  for name in ("one", "other"):
    _write_cache(home / ".cache/vera_jax/tokens" / name, b"")
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith(f"What belongs in {home}/.cache/vera_jax isn't")


CACHES = """
import os
import jax
from vera_jax.train.runtime import use_compilation_cache
use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


@pytest.mark.slow
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
