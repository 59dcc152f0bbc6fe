"""Files from elsewhere opened with care, JSON read with clear errors, and files
and folders written whole or not at all.

A downloaded folder, an archive or a data set was made by somebody else. What
looks like a file of it may be a link to a device, a pipe that never ends, or a
private file of this machine. So whatever comes from elsewhere goes through
`open_file`, or `check_file` before a library opens it by itself, and JSON
through `parse_json`.
"""

import difflib
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from safetensors import SafetensorError

from vera_jax.errors import UserError
from vera_jax.places import is_remote, place, staged, store

log = logging.getLogger(__name__)
HOME = Path("~/.cache/vera_jax")  # of what can be made again
# The most bytes of a file by its kind. In memory JSON takes up to thirty times
# as many.
JSON = 64 * 2**20
IMAGE = 256 * 2**20
DATA = 64 * 2**30
TENSORS = 2**40
LINE = 64 * 2**20  # and of a line
PART = 2**20  # that are read at once
DEPTH = 100  # of JSON; Python's own walks over a value go as deep as it is
BLANK = "it is empty"
BOM = b"\xef\xbb\xbf"  # with which some editors begin a file
# Of what is no regular file, by the test of its mode.
KINDS: dict[Callable[[int], bool], str] = {
  stat.S_ISDIR: "a folder",
  stat.S_ISFIFO: "a pipe",
  stat.S_ISSOCK: "a socket",
  stat.S_ISCHR: "a device",
  stat.S_ISBLK: "a device",
}


def open_file(
  file: str | Path, *, inside: Path | None, limit: int
) -> BufferedReader:
  """Open a file that comes from elsewhere, to read its bytes.

  Args:
    file: its path.
    inside: the folder that it belongs to: behind all links it must lie below
      that one, or in the hub's cache among the blobs that the folder's files
      are links to. None for a file that a person has named, which may be a
      link to anywhere. An object of a store is not asked where it lies.
    limit: the most bytes that it may have, such as `JSON`.

  Raises:
    UserError: it is missing, unreadable, no regular file, elsewhere, or too
      large.
  """
  if is_remote(file):
    return _open_object(str(file), limit)
  try:
    real = Path(os.path.realpath(file, strict=True))
    if inside is not None and not any(
      real.is_relative_to(folder) for folder in _places(inside)
    ):
      raise UserError(
        f"{file} is not used: it leads to {real}, outside of {inside}. Put a"
        " copy of the file itself there."
      )
    # looked at before, since opening a device may have an effect
    _check_kind(file, os.stat(real).st_mode)
    # and again once it is open, when nobody can put something else there
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    opened = os.fdopen(descriptor, "rb")
  except FileNotFoundError as error:
    near = _near(Path(file)) if inside is None else ""
    raise UserError(f"There is no {file}.{near}") from error
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror}.") from error
  except ValueError as error:  # a zero byte in the name
    raise UserError(f"{str(file)!r} is no name of a file.") from error
  status = os.fstat(descriptor)
  try:
    _check_kind(file, status.st_mode)
    _check_size(file, status.st_size, limit)
  except UserError:
    opened.close()
    raise
  return opened


def _near(missing: Path) -> str:
  """Which file beside a missing one may be meant, as a question."""
  with suppress(OSError):
    names = [path.name for path in missing.parent.iterdir()]
    if near := difflib.get_close_matches(missing.name, names, n=1, cutoff=0.8):
      return f" Is it {missing.with_name(near[0])}?"
  return ""


def _check_size(file: str | Path, size: int, limit: int) -> None:
  if size > limit:
    raise UserError(
      f"{file} is not used: it has {size:,} bytes, and at most {limit:,} are"
      " read of such a file."
    )


def _open_object(name: str, limit: int) -> BufferedReader:
  """A store's object as it is now, whole, in a local file that has no name."""
  try:
    info = store().info(name)
    if info["type"] != "file":
      raise UserError(f"{name} can't be read: it is a folder.")
    _check_size(name, info["size"], limit)
    with tempfile.NamedTemporaryFile() as copy:
      store().get_file(name, copy.name)
      return open(copy.name, "rb")
  except FileNotFoundError as error:
    raise UserError(f"There is no {name}.") from error
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"{name} can't be read: {reason}.") from error


def _places(folder: Path) -> list[Path]:
  """Where a folder's files may really lie."""
  real = folder.resolve()
  # models--owner--name has snapshots/COMMIT/… and, beside them, blobs
  blobs = [
    above.parent / "blobs"
    for above in real.parents
    if above.name == "snapshots"
  ]
  return [real, *blobs]


def _check_kind(file: str | Path, mode: int) -> None:
  if not stat.S_ISREG(mode):
    kind = next((k for test, k in KINDS.items() if test(mode)), "no file")
    raise UserError(f"{file} can't be read: it is {kind}, not a regular file.")


def check_file(file: str | Path, *, inside: Path | None, limit: int) -> None:
  """Raises the errors of `open_file`; for what a library opens by itself."""
  open_file(file, inside=inside, limit=limit).close()


def read_bytes(file: str | Path, *, inside: Path | None, limit: int) -> bytes:
  """The content of a file that comes from elsewhere; as `open_file`."""
  # in parts: Python takes as much memory as it is asked to read, at once
  parts, rest = [], limit + 1
  with open_file(file, inside=inside, limit=limit) as opened:
    try:
      while rest and (part := opened.read(min(rest, PART))):
        parts.append(part)
        rest -= len(part)
    except OSError as error:
      raise UserError(f"{file} can't be read: {error.strerror}.") from error
  data = b"".join(parts)
  if len(data) > limit:  # it has grown, or the system doesn't know its size
    raise UserError(f"{file} is not used: it has more than {limit:,} bytes.")
  return data


def read_lines(opened: BinaryIO, *, name: str | Path) -> Iterator[bytes]:
  """A file's lines, none of which may be longer than `LINE`.

  Raises:
    UserError: one is longer; the message names the file by `name`.
  """
  number = 0
  while line := opened.readline(LINE + 1):
    number += 1
    if len(line) > LINE:
      raise UserError(
        f"{name}:{number}: the line has more than {LINE:,} bytes."
      )
    yield line


def parse_json(data: bytes | str, *, nan: bool = False) -> Any:
  """The value of a text in JSON.

  Args:
    data: UTF-8, or decoded.
    nan: whether the text may have the numbers NaN and Infinity, as our own
      metrics do: in what others write they are mistakes.

  Raises:
    ValueError: it is no JSON, or such as no program writes: two values under
      one key, nested deeper than `DEPTH`, half a character. A UnicodeError
      where it is not UTF-8.
  """
  text = data if isinstance(data, str) else data.decode("utf-8")
  too_deep = ValueError(f"it is nested too deeply, more than {DEPTH} levels")
  try:
    value = json.loads(text, object_pairs_hook=_object)
  except RecursionError:
    raise too_deep from None
  level: list[Any] = [[value]]
  for _ in range(DEPTH + 2):  # a vocabulary has 100,000 entries: in one loop
    level = [
      x
      for part in level
      for x in (part.values() if type(part) is dict else part)
      if type(x) is dict or type(x) is list
    ]
    if not level:
      break
  else:
    raise too_deep
  # what can't be written again: half a character, and numbers that are none
  json.dumps(value, ensure_ascii=False, allow_nan=nan).encode()
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"the key {twice!r} is there twice")
  return made


def read_json(
  file: Path,
  *,
  hint: str = "",
  limit: int = JSON,
  nan: bool = False,
) -> dict[str, Any]:
  """The object in a file.

  Args:
    file: UTF-8 text, which belongs to the folder that it is in.
    hint: a sentence for the user that every error ends with.
    limit: the most bytes.
    nan: as for `parse_json`.

  Raises:
    UserError: as `open_file` and `parse_json` say, or the file holds something
      else.
  """
  end = f" {hint}" if hint else ""
  try:
    data = read_bytes(file, inside=file.parent, limit=limit)
  except UserError as error:
    raise UserError(f"{error}{end}") from error
  try:
    value = parse_json(data, nan=nan)
  except ValueError as error:
    raise UserError(f"{file} can't be read as JSON: {error}.{end}") from error
  if not isinstance(value, dict):
    raise UserError(f"{file} can't be read: it is not a JSON object.{end}")
  return value


class JsonLine(NamedTuple):
  """A line's object, or what is wrong with it; `number` counts from 1."""

  number: int
  values: dict[str, Any] = {}
  error: str = ""


def json_lines(
  lines: Iterable[bytes], *, nan: bool = False
) -> Iterator[JsonLine]:
  """The objects of JSON lines, in order.

  A line that can't be read is an entry that says why, so that its reader can go
  on with the next.

  Args:
    lines: undecoded, as `read_lines` gives them.
    nan: as for `parse_json`.
  """
  for number, line in enumerate(lines, 1):
    line = line.removeprefix(BOM) if number == 1 else line
    if not line.strip():
      yield JsonLine(number, error=BLANK)
      continue
    try:
      values = parse_json(line, nan=nan)
    except UnicodeError:
      yield JsonLine(number, error="it is not UTF-8")
    except ValueError as error:
      yield JsonLine(number, error=f"it is no JSON ({error})")
    else:
      if isinstance(values, dict):
        yield JsonLine(number, values)
      else:
        yield JsonLine(number, error="it is no JSON object")


def write_json(path: Path, value: Any) -> None:
  """Write a value as indented JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Write UTF-8 text, whole or not at all."""
  write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
  """Let `write` fill a file that appears whole or not at all.

  Readers never see half of it, not even when the machine goes down. Where
  several processes write the same file, the last one's is kept.
  """
  if is_remote(path):
    with staged(path) as file:
      write_file(file, write)
    return
  new = path.with_name(f".{path.name}-{uuid.uuid4().hex}.new")
  try:
    with new.open("xb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  except BaseException as error:
    new.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno is not None:
      error.filename = str(path)  # a full disk names none
    raise


T = TypeVar("T")


def make_folder(folder: Path, fill: Callable[[Path], T]) -> T:
  """Let `fill` write into a folder that appears whole or not at all.

  Where several processes make the same folder, the first one's is kept. In a
  store it appears object by object, JSON last.

  Returns:
    What `fill` returns.

  Raises:
    UserError: it can't be written.
  """
  if is_remote(folder):
    with staged(folder) as local:
      return make_folder(local, fill)
  new = folder.absolute().with_name(f".{uuid.uuid4().hex}.new")
  try:
    new.mkdir(parents=True)
    made = fill(new)
    try:
      new.rename(folder)
    except OSError:
      if not folder.is_dir():  # else another process was faster
        raise
    return made
  except (OSError, SafetensorError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{folder} can't be written: {reason}.") from error
  finally:
    shutil.rmtree(new, ignore_errors=True)


def cached_folder(
  kind: str, file: Path, key: str, fill: Callable[[Path], Any]
) -> Path:
  """The folder in Hugging Face's layout that stands for a file, made once.

  Args:
    kind: the kind of file, which has a folder of the cache.
    file: gives the folder its name.
    key: stands for what is in the folder. Another key makes another folder.
    fill: writes it, config.json among its files.

  Raises:
    UserError: it can't be written.
  """
  cache = HOME.expanduser() / kind
  folder = cache / f"{file.stem[:40]}-{key}"
  if not (folder / "config.json").is_file():
    make_folder(folder, fill)
  return folder


def say_uncached(folder: Path, reason: str | None) -> None:
  """Warns that a cache can't be written, once; of the home's, once for all."""
  home = HOME.expanduser()
  _say_uncached(home if home in folder.parents else folder, reason)


@functools.cache
def _say_uncached(folder: Path, reason: str | None) -> None:
  log.warning(
    "What belongs in %s isn't cached (%s), so each start makes it anew.",
    folder,
    reason,
  )


def check_free(folder: str | Path) -> Path:
  """The folder to write into, with ~ as the home folder.

  Raises:
    UserError: it is a file, or is not empty.
  """
  path = place(folder)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{folder} is there already; choose another --out.")
  return path


def sha256_of(file: Path) -> str:
  """The checksum in hexadecimal digits of a file that a person has named.

  Raises:
    UserError: it can't be read, or is no regular file.
  """
  try:
    with open_file(file, inside=None, limit=TENSORS) as opened:
      return hashlib.file_digest(opened, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror}.") from error
