"""Several processes, one run: the start, and what they do at the same moment.

Process 0 writes logs and results, takes the folder's lock and looks after the
saves; the others wait for it. All need to see the same folder. With a single
process nothing here does anything.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vera_jax.errors import UserError
from vera_jax.hub import trouble

PATIENCE = 300.0  # seconds until missing processes are given up
FLAGS = ("coordinator", "num_processes", "process_id")
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
_GRACE = 2.0
_TOLD_BYTES = 4096  # of an error's text, for the other processes


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  patience: float = PATIENCE,
) -> None:
  """Join the other processes, if there are any; before any device is used.

  The three arguments, or none: then a TPU pod's or SLURM's own variables tell,
  and without these the process is alone. `num_processes=1` by itself leaves it
  alone whatever they say.

  Args:
    coordinator: HOST:PORT, where process 0 listens; HOST is its machine.
    num_processes: of the whole run.
    process_id: from 0 to num_processes - 1.
    patience: seconds to wait for the others.

  Raises:
    UserError: arguments that don't fit, or others that did not come.
  """
  given = dict(
    zip(FLAGS, (coordinator, num_processes, process_id), strict=True)
  )
  if given == {**dict.fromkeys(FLAGS), "num_processes": 1}:
    return
  if all(value is None for value in given.values()):
    if not is_launched(os.environ):
      return
    where = "by the launcher's variables"
  else:
    _check(given)
    where = f"at {coordinator}"
  # ours hears SIGTERM; jax's own listener would keep it from us
  jax.config.update("jax_enable_preemption_service", False)
  start = partial(
    jax.distributed.initialize,
    coordinator,
    num_processes,
    process_id,
    # given up by us first: jax ends the process without a word to Python
    initialization_timeout=int(patience) + 600,
    shutdown_timeout_seconds=60,
  )
  error = trouble(start, patience)
  if error is not None:
    raise UserError(
      f"The processes did not come together {where}: {error}. All of them are"
      " started with the same --coordinator=HOST:PORT and --num_processes, each"
      " with its own --process_id; HOST is the machine of process 0, and the"
      " port has to be free and open there. --num_processes=1 starts one alone."
    ) from error


def _check(given: Mapping[str, Any]) -> None:
  lacking = [f"--{name}" for name, value in given.items() if value is None]
  if lacking:
    raise UserError(
      f"Without a value: {', '.join(lacking)}. Several processes need all of"
      " --coordinator=HOST:PORT, --num_processes and --process_id."
    )
  host, _, port = given["coordinator"].rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f"--coordinator={given['coordinator']}: give HOST:PORT, the machine of"
      " process 0 and a free port there."
    )
  number, count = given["process_id"], given["num_processes"]
  if not 0 <= number < count:
    raise UserError(
      f"--process_id={number} of --num_processes={count}: the processes are"
      f" numbered from 0 to {count - 1}."
    )


def is_launched(environment: Mapping[str, str]) -> bool:
  """Whether SLURM or a TPU pod started this process as one of several."""
  if all(name in environment for name in _SLURM):
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
    return int(tasks) > 1
  if environment.get("JAX_PLATFORMS") == "cpu":
    return False
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
    return True
  if "TPU_SKIP_MDS_QUERY" in environment or find_spec("libtpu") is None:
    return False
  # a TPU's virtual machine: its metadata know the pod, and jax asks them
  chips = ("accel[0-9]*", "vfio/[0-9]*")
  return any(any(Path("/dev").glob(chip)) for chip in chips)


def are_several() -> bool:
  """Whether there are other processes; asks no device of one that is alone."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes."""
  return not are_several() or jax.process_index() == 0


def leave(code: int, *, together: bool) -> None:
  """End one of several processes, without waiting for those that still work.

  Args:
    code: the process's exit code.
    together: the others end too; they are waited for as Python ends.
  """
  if together or not jax.distributed.is_initialized():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  time.sleep(_GRACE)  # the others may have the same error to tell
  os._exit(code)


def on_first(act: Callable[[], None]) -> None:
  """Let process 0 act; the others wait, and fail as it does.

  Raises:
    UserError: what `act` raised, in every process.
  """
  if not are_several():
    return act()
  told, error = "", None
  if is_first():
    try:
      act()
    except Exception as raised:  # told to the others before it is raised here
      error, told = raised, str(raised) or type(raised).__name__
  text = np.zeros(_TOLD_BYTES, np.uint8)
  data = told.encode()[:_TOLD_BYTES]
  text[: len(data)] = np.frombuffer(data, np.uint8)
  told = (
    bytes(multihost_utils.broadcast_one_to_all(text))
    .rstrip(b"\0")
    .decode(errors="ignore")
  )
  if error is not None:
    raise error
  if told:
    raise UserError(told)
