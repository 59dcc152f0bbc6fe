"""A run's folder: one config, resumed by the same config, never by another.

config.json  checkpoints/  metrics.jsonl  tensorboard/  adapter/  result.json
and failed.json instead of the last two where a loss was not finite. `began`
says since when all time counts; `lock` is there while a process trains;
`damaged/` has the saves, and lines of metrics.jsonl, that could not be used.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from vera_jax import results
from vera_jax.adapters.methods import METHODS, groups_of
from vera_jax.adapters.plans import AUTO
from vera_jax.errors import UserError
from vera_jax.files import read_bytes, read_json, write_json, write_text
from vera_jax.locks import (
  await_owner,
  describe_owner,
  is_locked,
  is_mine,
  locked,
)
from vera_jax.places import is_remote, store_error
from vera_jax.pretrained.sharding import RUNS
from vera_jax.train.distributed import are_several, on_first

DAMAGED = "damaged"
BEGAN = "began"  # the Unix time of the first start
SHOWS = 10.0  # seconds until other hosts see a new file
_FULL = (errno.ENOSPC, errno.EDQUOT)

# What may differ between a run and its resumption: it changes no result.
FREE = ("log", "predict_test")
# And in groups: how the runs beside it are split; and whether bad rows are left
# out, which the data's fingerprint shows.
FREE_IN = {"mesh": (RUNS,), "data": ("skip_bad_rows",)}
# In these and a method's, what is a part of the identity only where it is set.
IF_SET = ("general", "pair")
SCAN = "model.scan"


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that make a run what it is; of methods, those that it uses."""
  used = [*groups_of(str(config.get("method"))).values()]
  others = {line.group or name for name, line in METHODS.items()} - {*used}
  settings = {k: v for k, v in config.items() if k not in {*FREE, *others}}
  for group in (*FREE_IN, *used):
    of_group = settings.get(group)
    if not isinstance(of_group, Mapping):  # in a config.json that was changed
      continue
    if left := {
      k: v
      for k, v in of_group.items()
      if k not in FREE_IN.get(group, ()) and (v or k not in IF_SET)
    }:
      settings[group] = left
  return settings


def identity_code(config: Mapping[str, Any]) -> str:
  """Eight letters that name a run: equal for equal `identity`."""
  text = json.dumps(identity(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed_settings(
  theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[str]:
  """A line for each setting of a run's identity that is not the same."""
  there, now = (
    # as JSON reads them back: tuples are lists there
    flatten_dict(json.loads(json.dumps(identity(config))), sep=".")
    for config in (theirs, ours)
  )
  # whether layers are stacked or looped may still be to be chosen
  is_open = AUTO in (there.get(SCAN), now.get(SCAN))
  return [
    f"{key}: {there.get(key, 'unset')!r} there, {now.get(key, 'unset')!r} now"
    for key in sorted({*now, *there})
    if now.get(key) != there.get(key) and not (key == SCAN and is_open)
  ]


def check_workdir(
  workdir: Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Refuse a folder that holds a run of another config, or an unknown run.

  Returns:
    The config that the folder holds, if there is one.

  Raises:
    UserError: naming each key that differs, with both values, if any.
  """
  path = workdir / "config.json"
  if not path.exists():
    if (workdir / "checkpoints").exists():
      raise UserError(
        f"{workdir} holds checkpoints, but no config.json that says of what"
        " run. Choose another --workdir, or remove them."
      )
    return None
  written = read_json(path, hint="Choose another --workdir.")
  differ = changed_settings(written, config)
  if differ:
    raise UserError(
      f"{workdir} holds a run of another config. Choose another --workdir, or"
      " the same settings to resume it. Different are:\n  "
      + "\n  ".join(differ)
    )
  return written


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
  """Make the folder this config's, after `check_workdir`."""
  check_workdir(workdir, config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", dict(config))
  except OSError as error:
    raise UserError(f"{workdir} can't be used: {error.strerror}.") from error


def first_start(workdir: Path, now: float) -> float:
  """When the run first began: now, or what its folder has kept, Unix times."""
  path = workdir / BEGAN
  try:
    return float(read_bytes(path, inside=workdir, limit=100))
  except (FileNotFoundError, UserError, ValueError):
    if path.is_dir():
      raise UserError(
        f"{path} is a folder, and a run keeps the time when it began there."
        " Remove it."
      ) from None
    write_text(path, f"{now}\n")
  return now


def write_failure(
  workdir: Path,
  config: Mapping[str, Any],
  reason: str,
  *,
  step: int | None = None,
  primary: bool = True,
) -> dict[str, Any]:
  """Mark a run as failed; returns the contents of failed.json.

  Args:
    workdir: the run's folder.
    config: the run's.
    reason: why it can't go on, for a person.
    step: the step that failed, or None where the run came to none.
    primary: whether this process writes.
  """
  failure = {
    "task": config["task"],
    "method": config["method"],
    "seed": config["seed"],
    "step": step,
    "failed": reason,
    "config": dict(config),
  }
  if primary:
    results.write(workdir, failure, results.FAILED)
  return failure


class LockLost(UserError):
  """Another process has taken a run over, and this one must not write on."""


class DiskFull(UserError):
  """There is no space left; a run goes on from its last save when there is."""


class StoreLost(UserError):
  """The store did not answer, after all attempts; it may later."""


def require_lock(workdir: Path) -> None:
  """Called before anything is written that another process would go on from.

  Raises:
    LockLost: the folder's lock is no longer this process's.
  """
  path = workdir / "lock"
  if not is_mine(path):
    owner = f"by {describe_owner(path)} now"
    raise LockLost(
      f"{workdir} is locked {owner if is_locked(path) else 'by nobody now'}:"
      " this process has lost its lock, since it was stopped, or out of reach,"
      " for minutes, or the lock was removed. It ends here and writes nothing"
      " more; what it saved before is good."
    )


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
  """Keep other processes from training in a folder, made if missing.

  A folder in which nothing was written goes again with the lock.

  Raises:
    UserError: another process has the lock; the message says which, and where.
  """
  path = workdir / "lock"

  def remove_if_empty() -> None:
    with suppress(OSError):
      workdir.rmdir()  # fails for a folder with files

  with ExitStack() as stack:
    if not is_remote(workdir):  # a store has no empty folders
      stack.callback(remove_if_empty)
    try:
      mine = stack.enter_context(locked([path]))
      if not mine:
        await_owner(path)
        mine = stack.enter_context(locked([path]))
    except OSError as error:
      raise UserError(f"{workdir} can't be used: {error.strerror}.") from error
    if not mine:
      raise UserError(
        f"Another run is at work in {workdir}: {describe_owner(path)}. Wait for"
        " it, stop it, or choose another --workdir."
      )
    yield


def check_shared(workdir: Path) -> None:
  """Refuse a folder that is not the same one for all processes of a run.

  Process 0 writes a file of a new name, which all others must see: on a pod
  each host may have a folder of the workdir's name on its own disk.

  Raises:
    UserError: in all processes, naming those that don't see it.
  """
  if not are_several():
    return
  drawn = np.uint32(secrets.randbits(32))
  number = int(multihost_utils.broadcast_one_to_all(drawn))
  file, until = workdir / f".seen-by-all-{number:08x}", time.monotonic() + SHOWS
  on_first(lambda: write_text(file, ""))
  sees = False
  while not sees and time.monotonic() < until:
    with suppress(OSError):
      sees = file.exists()
    time.sleep(0.0 if sees else 0.5)
  # an array of equal size from each
  host = socket.gethostname().encode()[:64].ljust(64, b"\0")
  answer = np.frombuffer(bytes([sees]) + host, np.uint8)
  answers = multihost_utils.process_allgather(answer)
  on_first(lambda: file.unlink(missing_ok=True))
  hosts = [bytes(row[1:]).rstrip(b"\0").decode() for row in answers]
  blind = [f"{i} on {hosts[i]}" for i, row in enumerate(answers) if not row[0]]
  if blind:
    raise UserError(
      f"{workdir} is not one folder for all processes: what process 0 on"
      f" {hosts[0]} writes there is not seen by process {', '.join(blind)}."
      " Name a folder that all hosts share: gs://BUCKET/NAME, or a path on a"
      " shared file system."
    )


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
  """Whether an error, or one that led to it, comes from a full disk."""
  while error is not None:
    if isinstance(error, OSError):
      if error.errno in _FULL:
        return True
      if not is_remote(folder) and shutil.disk_usage(folder).free == 0:
        return True
    # C++ libraries raise errors of their own, with the system's text in them
    if any(os.strerror(number) in str(error) for number in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextmanager
def explain_full_disk(workdir: Path) -> Iterator[None]:
  """Turn errors of a full disk, or of a store, into one that says what to do.

  Raises:
    DiskFull, StoreLost: no space is left; a store could not be asked.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if is_remote(workdir) and (reason := store_error(error)):
      raise StoreLost(
        f"{workdir} can't be reached ({type(reason).__name__}: {reason}). What"
        " was saved there is good; the same command goes on from the last save."
      ) from error
    if not is_disk_full(error, workdir):
      raise
    raise DiskFull(
      f"The disk of {workdir} is full. What was saved there is good: free some"
      " space, and the same command goes on from the last save."
    ) from error
