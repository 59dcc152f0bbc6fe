"""How this process runs XLA: what is kept on disk and in memory, what is spent
on compiling.

Each holds for the whole process or for one program, changes no result, and
leaves alone what the user has set.
"""

import ctypes
import errno
import os
import platform
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.stages import Compiled, Traced

from vera_jax.files import HOME, say_uncached
from vera_jax.train.flops import flops_of

# glibc's mallopt(3): numbers from malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER, _PAD = 2**31 - 1, 2**26  # bytes
_CORES = 4  # that the compiling of one program can use
T = TypeVar("T")


def prepare() -> None:
  """Call before JAX looks for devices: threads keep the memory they have."""
  leave_libtpu_alone()
  keep_freed_memory()
  use_compilation_cache()


def leave_libtpu_alone(devices: Path = Path("/dev")) -> None:
  """Use the CPU where libtpu is installed, say for plans, but there is no TPU.

  JAX would start it to look for one, and it prints lines of errors. Nothing is
  done where the user has chosen, where a TPU's device file is there (`accel0`,
  or `vfio/0` from v5e on), or where another plugin, as CUDA's, may serve.
  """
  others = entry_points(group="jax_plugins") or find_spec("jax_plugins")
  tpus = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
  if jax.config.values["jax_platforms"] or "JAX_FORCE_TPU_INIT" in os.environ:
    return
  if find_spec("libtpu") and not tpus and not others:
    jax.config.update("jax_platforms", "cpu")


def use_compilation_cache() -> None:
  """Keep compiled programs, unless JAX_COMPILATION_CACHE_DIR says where."""
  if jax.config.values["jax_compilation_cache_dir"] is None:
    cache = (HOME / "xla").expanduser()
    try:  # jax would warn of each program
      cache.mkdir(parents=True, exist_ok=True)
      if not os.access(cache, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
      say_uncached(cache, error.strerror)
      return
    jax.config.update("jax_compilation_cache_dir", str(cache))
  # small programs too: together they take as long as the step
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_freed_memory() -> None:
  """Let glibc reuse what a step frees instead of giving it back to the kernel.

  On CPU XLA allocates a step's temporaries anew each time. As glibc comes, the
  kernel then maps, zeroes and unmaps all their pages: a fifth of the step's
  time. Programs run in the main thread, for only its arena holds blocks as
  large as that.
  """
  if platform.libc_ver()[0] != "glibc" or _is_tuned():
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  libc = ctypes.CDLL(None)
  for option, value in (
    (_MMAP_MAX, 0),  # large blocks come from the heap, where they stay
    (_TRIM_THRESHOLD, _NEVER),  # the heap's end is not given back
    (_TOP_PAD, _PAD),  # and it grows in pieces that are worth a system call
    (_ARENA_MAX, 1),  # later threads share it: memory lies in fewer pieces
  ):
    libc.mallopt(option, value)


def return_freed_memory() -> None:
  """Give the kernel, once, what glibc holds free: after compiling it is much,
  in pieces too small for a step's temporaries."""
  if platform.libc_ver()[0] == "glibc" and not _is_tuned():
    ctypes.CDLL(None).malloc_trim(0)


def _is_tuned() -> bool:
  """Whether the user has set the allocator, or loads another."""
  names = ("GLIBC_TUNABLES", "LD_PRELOAD")
  return any(k.startswith("MALLOC_") or k in names for k in os.environ)


def compiler_options(platform: str) -> dict[str, Any] | None:
  """For `jax.jit`, unless XLA_FLAGS says otherwise.

  On CPU a step's time is in ready-made matrix products. Code of LLVM's first
  level around them makes it as quick as the third's, and compiles in half the
  time.
  """
  level = "xla_backend_optimization_level"
  if platform != "cpu" or level in os.environ.get("XLA_FLAGS", ""):
    return None
  return {level: 1}


def meanwhile(function: Callable[[], T]) -> Future[T]:
  """What a function gives, in a thread that no end of the process waits for."""
  future: Future[T] = Future()

  def work() -> None:
    try:
      future.set_result(function())
    except BaseException as error:  # raised where the result is asked for
      future.set_exception(error)

  threading.Thread(target=work, daemon=True, name="meanwhile").start()
  return future


class Background:
  """Compiles programs in other threads while what is compiled runs.

  Few at a time, in the order in which they are asked for: one keeps several
  cores busy. Where steps run on fewer cores than that, each program waits until
  it is needed: compiling beside a step would save no time, and take memory on
  top of the step's. Calls of a jitted function wait for nothing: `wait` before
  them, or it is compiled twice.

  Attributes:
    flops: of each program that has been waited for.
  """

  def __init__(self) -> None:
    # at most so many at once, or they would only slow down each other and the
    # one that is waited for
    count = (os.cpu_count() or 1) // _CORES
    self._pool = ThreadPoolExecutor(max(1, count), "compile")
    self._ahead = count > 0 or jax.default_backend() != "cpu"
    self._later: dict[Hashable, Callable[[], Compiled]] = {}
    self._tasks: dict[Hashable, Future[Compiled]] = {}
    self.flops: dict[Hashable, float] = {}

  def compile(self, name: Hashable, trace: Callable[[], Traced]) -> None:
    """Begin with a program, at once or when it is waited for.

    Nothing happens where it has been asked for before.

    Args:
      name: what `wait` knows it by.
      trace: returns what a jitted function's `trace` does.
    """

    def compiled() -> Compiled:
      # What it returns is kept by nobody: jax finds the program by itself when
      # the jitted function is called with such arguments.
      if not self._ahead:  # no step runs, and what the last one used is free
        return_freed_memory()
      traced = trace()
      self.flops[name] = flops_of(traced.jaxpr.jaxpr)
      program = traced.lower().compile()
      return_freed_memory()
      return program

    if name not in self._tasks:
      self._later.setdefault(name, compiled)
      if self._ahead:
        self._begin(name)

  def wait(
    self, name: Hashable, *, unless: Callable[[], bool] = lambda: False
  ) -> None:
    """Until the program is compiled; its errors are raised here.

    One that was not asked for is compiled by its first call. `unless` is asked
    now and then, and when it holds this returns before.
    """
    if name in self._later:
      self._begin(name)
    task = self._tasks.get(name)
    while task and not task.done() and not unless():
      wait([task], 0.5)
    if task and task.done():
      task.result()

  def _begin(self, name: Hashable) -> None:
    self._tasks[name] = self._pool.submit(self._later.pop(name))
