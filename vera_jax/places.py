"""Places by name: a path of this machine, or gs://BUCKET/NAME in a store.

This module alone knows which stores there are. `place` makes a path of a name,
and the rest of the package works with what it returns: for gs:// that is an
`etils.epath.Path`, which has pathlib's methods. What is only read, such as data
and bases, comes through `local_copy` and is a local file from there on. What
writes local files alone asks `local_place`, which refuses a store.

A store has objects and no folders: an object appears whole or not at all, can't
be appended to, and a folder is there while an object has its name in front.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from vera_jax.errors import UserError, install

log = logging.getLogger(__name__)

STORE = "gs://"
OFTEN = 5.0  # seconds between copies of a file that grows
CLIENT = ("gcsfs", "google", "aiohttp", "requests")  # whose errors are its
CACHE = "~/.cache/vera_jax/objects"
# gs:/ as well: pathlib makes that of gs://, and a folder named gs: of that
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PATTERN = re.compile(r"[*?\[\]#]|(^|/)\.\.?(/|$)")


def place(name: str | Path) -> Path:
  """The path of a file or folder that is read or written where it is.

  Args:
    name: a local path, which may begin with ~, or gs://BUCKET/NAME.

  Returns:
    An absolute path. One in a store is no `pathlib.Path`, but is used as one.

  Raises:
    UserError: a store of another kind, or one that can't be used from here.
  """
  if not isinstance(name, str | Path):  # it comes from here
    return name
  text = str(name)
  if not _SCHEME.match(text):
    return Path(text).expanduser().absolute()
  bucket, _, key = text.removeprefix(STORE).partition("/")
  if not text.startswith(STORE) or not bucket:
    raise UserError(
      f"{text} is no place that can be read or written. What works: a path of"
      " this machine, or gs://BUCKET/NAME for Google Cloud Storage. Another"
      " store can be mounted as a folder, for instance by rclone."
    )
  if _PATTERN.search(key):
    raise UserError(
      f"{text}: a name in a store has none of * ? [ ] # here, and no . or .."
      " between slashes."
    )
  _check_bucket(bucket)
  from etils import epath

  return cast(Path, epath.Path(text))


def local_place(name: str | Path, what: str) -> Path:
  """A path of this machine, for what can't be in a store.

  Args:
    name: a local path, which may begin with ~.
    what: names it in the error, such as "--out".

  Raises:
    UserError: it is a store's.
  """
  if _SCHEME.match(str(name)):
    raise UserError(
      f"{what} is a path of this machine, and {name} is none. Copy it: gcloud"
      " storage cp -r FROM TO, where either may be gs://BUCKET/NAME."
    )
  return Path(name).expanduser()


def is_remote(path: str | Path) -> bool:
  """Whether a path, or its name, is one in a store."""
  return not isinstance(path, Path) and str(path).startswith(STORE)


@cache
def store() -> Any:
  """The client of the store, as fsspec has it; the one that epath uses.

  Raises:
    UserError: it isn't installed.
  """
  # TensorFlow would be imported if it is there, and be another client
  os.environ.setdefault("EPATH_USE_TF", "false")
  # buckets are asked for their kind otherwise, which needs another permission
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  try:
    import fsspec
    import gcsfs  # noqa: F401
    from etils.epath import backend
  except ImportError as error:
    raise UserError(
      f"{STORE} needs a client of the store: {install('gcs')} ({error})."
    ) from error
  # an old listing would hide what other processes have written since
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return backend.fsspec_backend.fs(STORE)


def store_error(error: BaseException | None) -> BaseException | None:
  """The error of the store's client that led to an error, if one did."""
  while error is not None:
    if type(error).__module__.partition(".")[0] in CLIENT:
      return error
    error = error.__cause__ or error.__context__
  return None


@cache
def _check_bucket(bucket: str) -> None:
  """Asked before anything is computed, and where the reason is still known."""
  try:
    store().call("GET", "b/{}/o", bucket, maxResults=1)
  except UserError:
    raise
  except Exception as error:  # of the client, of its login, of the network
    reason = "there is no such bucket"
    if not isinstance(error, FileNotFoundError):
      reason = str(error).strip() or type(error).__name__
    raise UserError(
      f"{STORE}{bucket} can't be used: {reason}. `gcloud auth"
      " application-default login` logs this machine in; its account, or a"
      " TPU's service account, needs the role Storage Object User."
    ) from error


def local_copy(
  name: str | Path, *, names: Container[str] | None = None
) -> Path:
  """A file or folder that is only read, as a local one.

  One in a store is copied into the cache, once for each state it is in: what is
  there is asked for each time, by name, size and generation.

  Args:
    name: a local path, which may begin with ~, or gs://BUCKET/NAME.
    names: of a folder in a store, the names of the files to copy; None for all.

  Returns:
    A local path; of a local name only the ~ is replaced.

  Raises:
    UserError: it isn't in the store, or doesn't arrive there whole.
  """
  if not is_remote(name) and not _SCHEME.match(str(name)):
    return Path(name).expanduser()
  source = str(place(name))
  state = _listing(source, names)
  if not state:
    raise UserError(f"There is no {source}, neither an object nor a folder.")
  digest = hashlib.sha256(json.dumps([source, state]).encode()).hexdigest()
  folder = Path(CACHE).expanduser() / digest[:20]
  # a data set may be called like its folder
  copy = folder.joinpath(*source.removeprefix(STORE).split("/")[-2:])
  if folder.is_dir():
    return copy
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
      for key, size, _ in state:
        file = Path(new, f"copy/{copy.relative_to(folder)}{key}")
        file.parent.mkdir(parents=True, exist_ok=True)
        store().get_file(source + key, str(file))
        if file.stat().st_size != size:
          raise UserError(
            f"{source}{key} was not copied whole: {file.stat().st_size:,} of"
            f" {size:,} bytes came. Give the same command again."
          )
      if _listing(source, names) != state:
        raise UserError(
          f"{source} changed while it was copied. Give the same command again"
          " once nothing writes there."
        )
      try:
        Path(new, "copy").rename(folder)
      except OSError:
        if not folder.is_dir():  # else another process was faster
          raise
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"{source} can't be copied here: {reason}.") from error
  return copy


def _listing(
  source: str, wanted: Container[str] | None
) -> list[tuple[str, int, str]]:
  """(the rest of its name, bytes, generation) of each object, in order."""
  objects = store().find(source, detail=True)
  start = len(source.removeprefix(STORE))
  # some programs leave an object for a folder, whose name ends so
  names = sorted(name for name in objects if not name.endswith("/"))
  if bad := next((name for name in names if ".." in name.split("/")), None):
    raise UserError(f"{STORE}{bad} has a name that leads out of its folder.")
  return [
    (name[start:], objects[name]["size"], objects[name]["generation"])
    for name in names
    if wanted is None or name.rpartition("/")[2] in wanted
  ]


def list_files(folder: Path) -> list[str]:
  """The names of all files below a folder, and of links, in order."""
  if is_remote(folder):
    return [name.removeprefix("/") for name, *_ in _listing(str(folder), None)]
  return sorted(
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_symlink() or not path.is_dir()
  )


def move_folder(folder: Path, target: Path) -> None:
  """Rename a folder; in a store all objects are copied, and then removed."""
  if is_remote(folder):
    store().mv(str(folder), str(target), recursive=True)
    return
  target.parent.mkdir(exist_ok=True)
  folder.rename(target)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
  """Where a new file or folder is written: there, or, if that is in a store, in
  a temporary folder of this machine, from which it is copied at the end."""
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    local = Path(folder, path.name)
    yield local
    upload(local, path)


def upload(source: Path, target: Path) -> None:
  """Copy a local file or folder to a store; JSON files, by which readers know
  that a folder is complete, last."""
  if source.is_file():
    store().put_file(str(source), str(target))
    return
  files = [path for path in source.rglob("*") if path.is_file()]
  for file in sorted(files, key=lambda path: (path.suffix == ".json", path)):
    name = file.relative_to(source).as_posix()
    store().put_file(str(file), f"{target}/{name}")


class Mirror:
  """A local folder for files that grow, which a store's objects can't.

  Every few seconds those that have grown are written to the store again, from a
  thread, and by `copy` at once.
  """

  def __init__(
    self, target: Path, check: Callable[[], object] = lambda: None
  ) -> None:
    """Begin with an empty folder, `local`, for the files of `target`.

    Args:
      target: a folder in a store.
      check: called before anything is copied; it raises where nothing may be.
    """
    self._target, self._folder = target, tempfile.TemporaryDirectory()
    self._check = check
    self.local = Path(self._folder.name)
    self._copied: dict[Path, int] = {}
    self._one_at_a_time, self._ended = threading.Lock(), threading.Event()
    threading.Thread(target=self._repeat, daemon=True, name="mirror").start()

  def copy(self) -> None:
    """Copy what has grown; errors of the store are raised."""
    with self._one_at_a_time:
      for file in self.local.rglob("[!.]*"):  # not what is half written
        if file.is_symlink() or not file.is_file():
          continue
        size = file.stat().st_size
        if self._copied.get(file) != size:
          self._check()
          name = file.relative_to(self.local).as_posix()
          upload(file, self._target / name)
          self._copied[file] = size

  def close(self) -> None:
    """Copy the rest; nothing is copied afterwards."""
    self._ended.set()
    try:
      self.copy()
    finally:
      self._folder.cleanup()

  def _repeat(self) -> None:
    pause = OFTEN
    while not self._ended.wait(pause):
      began = time.monotonic()
      try:
        self.copy()
      except Exception as error:  # the next time, or the next save, tells
        log.warning("%s can't be written now: %s", self._target, error)
      # long files, or a slow store, take a tenth of the time at most
      pause = max(OFTEN, 10 * (time.monotonic() - began))
