"""A run's folder: one config, resumed by the same config, never by another.

config.json  checkpoints/  metrics.jsonl  tensorboard/  adapter/  result.json
and failed.json instead of the last two where a loss was not finite. `lock` says
who trains in it; `damaged/` has the saves that could not be used.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vera_jax.errors import UserError
from vera_jax.files import read_json

log = logging.getLogger(__name__)

LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)

# What may differ between a run and its resumption: it changes no result.
FREE = ("log", "predict_test")


def write_json(path: Path, value: Any) -> None:
  """Write whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Write whole or not at all, even when the machine goes down."""
  new = path.with_name(path.name + ".new")
  with new.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)


def bound(config: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that make a run what it is."""
  return {k: v for k, v in config.items() if k not in FREE}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
  # as JSON reads them back: tuples are lists there
  return flatten_dict(json.loads(json.dumps(bound(config))), sep=".")


def differences(
  theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[str]:
  """A line for each setting that is another one there than now."""
  there, now = _flat(theirs), _flat(ours)
  return [
    f"{key}: {there.get(key, 'unset')!r} there, {now.get(key, 'unset')!r} now"
    for key in sorted({*now, *there})
    if now.get(key) != there.get(key)
  ]


def check(workdir: Path, config: Mapping[str, Any]) -> None:
  """Refuse a folder that holds a run of another config, or of none.

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
    return
  written = read_json(path, hint="Choose another --workdir.")
  differ = differences(written, config)
  if differ:
    raise UserError(
      f"{workdir} holds a run of another config. Choose another --workdir, or"
      " the same settings to resume it. Different are:\n  "
      + "\n  ".join(differ)
    )


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
  """Make the folder this config's."""
  check(workdir, config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", dict(config))
  except OSError as error:
    raise UserError(f"{workdir} can't be used: {error.strerror}.") from error


@contextmanager
def hold(workdir: Path) -> Iterator[None]:
  """Keep other processes from training in a folder, which is made if missing.

  The kernel frees the lock when the process ends, however it ends; the file
  stays. On a folder of several machines it keeps others out as far as the file
  system's flock does: NFS and Lustre mounted with flock do, and where a file
  system has none at all, a warning says so.

  Raises:
    UserError: another process holds it; the message says which, and where.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / LOCK).open("a+b", buffering=0)
  except OSError as error:
    raise UserError(f"{workdir} can't be used: {error.strerror}.") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(
        f"Another run is at work in {workdir}: {file.read().decode().strip()}."
        " Wait for it, stop it, or choose another --workdir."
      ) from error
    except OSError as error:
      log.warning(
        "%s can't be locked (%s): see to it that no second run uses it.",
        *(workdir, error.strerror),
      )
    with suppress(OSError):  # a full disk: held all the same
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    yield


def is_full(error: BaseException | None, folder: Path) -> bool:
  """Whether an error, or one that led to it, comes from a full disk."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(os.strerror(number) in str(error) for number in _FULL):
      return True  # what C++ libraries tell
    if isinstance(error, OSError) and shutil.disk_usage(folder).free == 0:
      return True
    error = error.__cause__ or error.__context__
  return False


@contextmanager
def full_disk_told(workdir: Path) -> Iterator[None]:
  """A full disk is the user's to mend, wherever it is met."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not is_full(error, workdir):
      raise
    raise UserError(
      f"The disk of {workdir} is full. What was saved there is good: free some"
      " space, and the same command goes on from the last save."
    ) from error
