"""Several processes, one run: the start, and what they do at the same moment.

Process 0 writes logs and results, takes the folder's lock and looks after the
saves; the others wait for it. All need to see the same folder. With a single
process nothing here does anything.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from vera_jax.errors import UserError
from vera_jax.hub import call_error
from vera_jax.train.peers import watch_others

PATIENCE = 300.0  # seconds until missing processes are given up
# Seconds without a heartbeat until jax's coordinator ends all. It goes
# by the wall clock, and a clock that is set forward is no loss; one that is set
# back always ends all, with 75. `peers.py` sees within a minute who is lost.
HEARTBEAT = 10 * 86_400
_SLURM = (  # what srun sets in each task of a step
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)
_ERROR_BYTES = 4096  # of an error's text, as sent to the other processes


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  patience: float = PATIENCE,
) -> None:
  """Join the other processes, if there are any; before any device is used.

  Give all three arguments, or none: then the variables of a TPU pod or of SLURM
  are used, and without these the process is alone. `num_processes=1` by itself
  leaves it alone whatever they say.

  Args:
    coordinator: HOST:PORT, where process 0 listens; HOST is its machine.
    num_processes: of the whole run.
    process_id: from 0 to num_processes - 1.
    patience: seconds to wait for the others.

  Raises:
    UserError: arguments that don't fit, or others that did not come.
  """
  if coordinator is None and process_id is None:
    if num_processes == 1:
      return
    if num_processes is None and not is_launched(os.environ):
      return
  given = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  lacking = [flag for flag, value in given.items() if value is None]
  where = "by the launcher's variables"
  if len(lacking) < len(given):
    if coordinator is None or num_processes is None or process_id is None:
      raise UserError(
        f"Without a value: {', '.join(lacking)}. Several processes need all of"
        " --coordinator=HOST:PORT, --num_processes and --process_id."
      )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
      raise UserError(
        f"--coordinator={coordinator}: give HOST:PORT, the machine of process 0"
        " and a free port there."
      )
    if not 0 <= process_id < num_processes:
      raise UserError(
        f"--process_id={process_id} of --num_processes={num_processes}: the"
        f" processes are numbered from 0 to {num_processes - 1}."
      )
    where = f"at {coordinator}"
  # we handle SIGTERM ourselves; jax's own listener would take it from us
  jax.config.update("jax_enable_preemption_service", False)
  start = partial(
    jax.distributed.initialize,
    coordinator,
    num_processes,
    process_id,
    # we give up first, since jax then ends the process without an exception
    initialization_timeout=int(patience) + 600,
    heartbeat_timeout_seconds=HEARTBEAT,
    shutdown_timeout_seconds=60,
  )
  error = call_error(start, seconds=patience)
  if error is not None:
    raise UserError(
      f"The processes did not come together {where}: {error}. All of them are"
      " started with the same --coordinator=HOST:PORT and --num_processes, each"
      " with its own --process_id; HOST is the machine of process 0, and the"
      " port has to be free and open there. --num_processes=1 starts one alone."
    ) from error
  one = global_state  # jax has no public way to its client
  if one.num_processes > 1:
    watch_others(one.client, one.process_id, one.num_processes)


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
  # a TPU's virtual machine: jax asks its metadata server about the pod
  chips = ("accel[0-9]*", "vfio/[0-9]*")
  return any(any(Path("/dev").glob(chip)) for chip in chips)


def are_several() -> bool:
  """Whether there are other processes; asks no device of one that is alone."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes."""
  return not are_several() or jax.process_index() == 0


def on_first(act: Callable[[], None]) -> None:
  """Let process 0 act; the others wait, and fail if it does.

  Raises:
    Exception: what `act` raised; in the other processes a UserError with its
      text.
  """
  if not are_several():
    return act()
  message, error = "", None
  if is_first():
    try:
      act()
    except Exception as raised:  # raised below, once the others know of it
      error, message = raised, str(raised) or type(raised).__name__
  data = message.encode()[:_ERROR_BYTES].ljust(_ERROR_BYTES, b"\0")
  sent = multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))
  message = bytes(sent).rstrip(b"\0").decode(errors="ignore")
  if error is not None:
    raise error
  if message:
    raise UserError(message)
