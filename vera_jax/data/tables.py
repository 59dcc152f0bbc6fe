"""Tables of texts, read row by row: CSV, TSV, JSON, JSON lines and Parquet.

A row that can't be read is an entry that says why, so that a reader of many
texts can go on with the next; `read_table` reads a whole file, and all of its
bad rows are reported together. Everything is UTF-8. CSV has quotes ("a ""b"",
c") and texts of several lines; in a TSV nothing is quoted, and a tab always
ends a cell. A JSON line is an object with the columns' names as keys, and JSON
one list of such objects. A name that ends in .json may mean either.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vera_jax.errors import UserError, install
from vera_jax.files import (
  BLANK,
  BOM,
  DATA,
  json_lines,
  open_file,
  parse_json,
  read_bytes,
  read_lines,
)
from vera_jax.places import local_copy

SUFFIXES = {
  ".csv": "csv",
  ".tsv": "tsv",
  ".jsonl": "jsonl",
  ".ndjson": "jsonl",
  ".json": "jsonl",
  ".parquet": "parquet",
}
FORMATS = (*dict.fromkeys(SUFFIXES.values()), "json")
SHOWN = 20  # names of columns that a message lists
SHOWN_ROWS = 10  # bad rows that it lists
# Cells that a table may have whose rows hold others than its columns are, and
# rows of a Parquet file with fewer bytes than rows.
CELLS, ROWS = 10_000_000, 1_000_000
# Bytes that a Parquet file may be unpacked to: so many, or a hundred times its
# own.
UNPACKED, RATIO = 2**29, 100
LIST = 4 * 2**30  # bytes of a list of JSON, which is held as a whole
_PEEK = 4096  # bytes, of which few are blank
csv.field_size_limit(2**31 - 1)  # characters of a cell; Python's is 131,072

Read = TypeVar("Read")


class Row(NamedTuple):
  """One row, or what is wrong with it.

  Attributes:
    number: the line that the row begins on; in Parquet and in a list of JSON
      the row's own number, from 1.
    values: the values by column; a header has its names, without values.
    error: why there are no values, or "".
    header: whether it is the line that names the columns.
  """

  number: int
  values: dict[str, Any] = {}
  error: str = ""
  header: bool = False


class Table(NamedTuple):
  """A whole table.

  Attributes:
    name: the file's, or the hub's.
    columns: the values of each, in the order of the rows.
    numbers: the number of each row: its line, where `lines` is set.
    classes: names of a column's class ids, where the file has them.
    lines: whether `numbers` counts lines.
    bad: the number of each row that can't be used, and a sentence that says
      where it is and why; such rows are in none of the columns.
  """

  name: str
  columns: dict[str, list[Any]]
  numbers: list[int]
  classes: dict[str, list[str]] = {}
  lines: bool = True
  bad: tuple[tuple[int, str], ...] = ()

  def place(self, row: int) -> str:
    """Where a row is, for messages."""
    return self._place(self.numbers[row])

  def _place(self, number: int) -> str:
    apart = ":" if self.lines else ", row "
    return f"{self.name}{apart}{number}"

  def read_each(
    self, read: Callable[[int], Read]
  ) -> tuple["Table", list[Read]]:
    """read(row) for every row.

    Args:
      read: raises a UserError for a row that can't be used.

    Returns:
      The table of the rows that can be used, the others being among its `bad`
      ones; and what was read of each.
    """
    values: list[Read] = []
    kept: list[int] = []
    bad = list(self.bad)
    for row, number in enumerate(self.numbers):
      try:
        values.append(read(row))
        kept.append(row)
      except UserError as error:
        bad.append((number, str(error)))
    if len(kept) == len(self.numbers):
      return self, values
    columns = {
      name: [column[row] for row in kept]
      for name, column in self.columns.items()
    }
    numbers = [self.numbers[row] for row in kept]
    return self._replace(
      columns=columns, numbers=numbers, bad=tuple(sorted(bad))
    ), values


def format_of(path: str | Path, *, inside: Path | None = None) -> str:
  """The format by the name's ending, or of a .json by whether it is a list.

  Args:
    path: the file.
    inside: the folder that it belongs to, see `files.open_file`.

  Raises:
    UserError: in none that is known.
  """
  path = local_copy(path)
  format = SUFFIXES.get(path.suffix.lower())
  if format is None:
    raise UserError(
      f"{path}: the name doesn't end in {', '.join(SUFFIXES)}, which say how a"
      " table is read."
    )
  if path.suffix.lower() == ".json" and path.is_file():
    with open_file(path, inside=inside, limit=DATA) as file:
      start = file.read(_PEEK).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
      return "json"
  return format


def read_rows(lines: Iterable[bytes], *, format: str) -> Iterator[Row]:
  """The rows of a text file; of CSV and TSV the header is the first.

  Args:
    lines: undecoded, as a binary file gives them.
    format: "csv", "tsv", "jsonl" or "json", which is read as a whole.
  """
  if format == "json":
    yield from _json_list(b"".join(lines))
    return
  if format == "jsonl":
    # Python's own writer has NaN where a cell is missing
    for line in json_lines(lines, nan=True):
      yield Row(*line)
    return
  names: list[str] = []
  for number, cells, error in _cells(lines, quoted=format == "csv"):
    if not error and cells in ([], [""]):
      error = BLANK
    elif not error and not names:
      repeated = [name for name, n in Counter(cells).items() if n > 1]
      if repeated:
        error = f"the column {min(repeated)!r} is there twice"
    elif not error and len(cells) != len(names):
      error = (
        f"it has {len(cells)} columns, but the header has {len(names)}"
        f" ({some(names)})"
      )
    if error:
      yield Row(number, error=error)
      if not names:  # without a header nothing more can be read
        return
    elif not names:
      names = cells
      yield Row(number, dict.fromkeys(names), header=True)
    else:
      yield Row(number, dict(zip(names, cells, strict=True)))


def _cells(
  lines: Iterable[bytes], *, quoted: bool
) -> Iterator[tuple[int, list[str], str]]:
  """(line, its cells, what is wrong) for each row of a CSV or TSV."""

  def decoded() -> Iterator[str]:
    for number, line in enumerate(lines):
      # a byte order mark may stand before the first line; what is no UTF-8 is
      # found in the cells, so that the reader can go on
      coding = "utf-8" if number else "utf-8-sig"
      yield line.decode(coding, "surrogateescape")

  texts = decoded()
  reader = csv.reader(texts, strict=True)
  number = 0
  while True:
    number = reader.line_num + 1 if quoted else number + 1
    error = ""
    try:
      if quoted:
        cells = next(reader)
      else:
        cells = next(texts).rstrip("\r\n").split("\t")
      "".join(cells).encode()
    except StopIteration:
      return
    except csv.Error as wrong:
      cells, error = [], f"it is no CSV ({wrong}); are its quotes paired?"
    except UnicodeError:
      cells, error = [], "it is not UTF-8"
    yield number, cells, error


def _json_list(content: bytes) -> Iterator[Row]:
  try:
    entries = parse_json(content.removeprefix(BOM), nan=True)
  except UnicodeError:  # also half a character, which JSON can write
    yield Row(1, error="it is not UTF-8")
    return
  except ValueError as wrong:
    yield Row(1, error=f"it is no JSON ({wrong})")
    return
  for number, values in enumerate(entries, 1):
    if isinstance(values, dict):
      yield Row(number, values)
    else:
      yield Row(number, error="it is no JSON object")


def arrow() -> Any:
  """The module pyarrow, which a plain install doesn't have.

  Raises:
    UserError: it isn't there.
  """
  try:
    import pyarrow.parquet
    import pyarrow.types
  except ImportError as error:
    raise UserError(
      f"Parquet files need pyarrow: {install('datasets')}"
    ) from error
  return pyarrow


@contextmanager
def open_parquet(
  path: Path, *, inside: Path | None = None, once: bool = False
) -> Iterator[Any]:
  """A Parquet file, as `pyarrow.parquet.ParquetFile`.

  What it says that it holds is checked: a hundred kilobytes can be a million
  times the same row.

  Args:
    path: the file.
    inside: the folder that it belongs to, see `files.open_file`.
    once: whether a text or bytes that a column repeats are in memory once, as
      Arrow's dictionaries.

  Raises:
    UserError: the file can't be read, then or while it is in use.
  """
  pyarrow = arrow()
  ParquetFile = pyarrow.parquet.ParquetFile
  try:
    with (
      open_file(path, inside=inside, limit=DATA) as opened,
      ParquetFile(opened) as file,
    ):
      about, size = file.metadata, opened.seek(0, 2)
      unpacked = sum(
        about.row_group(i).total_byte_size for i in range(about.num_row_groups)
      )
      if (
        about.num_rows > max(ROWS, size)
        or about.num_rows * about.num_columns > max(CELLS, 8 * size)
        or unpacked > _room(size)
      ):
        raise UserError(
          f"{path} is not used: its {size:,} bytes would become"
          f" {about.num_rows:,} rows of {about.num_columns:,} columns,"
          f" {unpacked:,} bytes."
        )
      if not once:
        yield file
        return
      leaves = [file.schema.column(i) for i in range(about.num_columns)]
      names = [x.path for x in leaves if x.physical_type == "BYTE_ARRAY"]
      opened.seek(0)
      with ParquetFile(opened, metadata=about, read_dictionary=names) as file:
        yield file
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise UserError(f"{path} can't be read as Parquet: {error}") from error


def parquet_rows(path: Path, *, inside: Path | None = None) -> Iterator[Row]:
  """The rows of a Parquet file.

  Args:
    path: the file.
    inside: the folder that it belongs to, see `files.open_file`.

  Raises:
    UserError: the file can't be read.
  """
  number = unpacked = 0
  with open_parquet(path, inside=inside, once=True) as file:
    room = _room(path.stat().st_size)
    for batch in file.iter_batches():
      unpacked += sum(map(_unpacked, batch.columns))
      if unpacked > room:
        raise UserError(
          f"{path} is not used: unpacked it has more than {room:,} bytes, for"
          " it repeats long cells."
        )
      for values in batch.to_pylist():
        number += 1
        yield Row(number, values)


def _unpacked(array: Any) -> int:
  """The bytes of an array of Arrow, each repeated text counted again."""
  import pyarrow
  from pyarrow import compute, types

  kind = array.type
  if types.is_dictionary(kind):
    words = array.dictionary
    if not isinstance(words, pyarrow.StringArray | pyarrow.BinaryArray):
      return array.nbytes
    return (
      compute.sum(compute.binary_length(words).take(array.indices)).as_py() or 0
    )
  if types.is_map(kind):
    return _unpacked(array.keys) + _unpacked(array.items)
  if types.is_struct(kind):
    return sum(map(_unpacked, array.flatten()))
  if types.is_list(kind) or types.is_large_list(kind):
    return _unpacked(array.flatten())
  return array.nbytes


def _room(size: int) -> int:
  """The most bytes that a Parquet file of that size may become."""
  return max(UNPACKED, RATIO * size)


def file_rows(
  path: str | Path, *, format: str | None = None, inside: Path | None = None
) -> Iterator[Row]:
  """The rows of a file, by its name's ending or as the format says.

  Args:
    path: the file.
    format: one of `FORMATS`; None for that of the name's ending.
    inside: the folder that it belongs to, see `files.open_file`.

  Raises:
    UserError: the file can't be read.
  """
  path = local_copy(path)
  format = format or format_of(path, inside=inside)
  if format == "parquet":
    yield from parquet_rows(path, inside=inside)
    return
  if format == "json":
    yield from _json_list(read_bytes(path, inside=inside, limit=LIST))
    return
  with open_file(path, inside=inside, limit=DATA) as file:
    yield from read_rows(read_lines(file, name=path), format=format)


def read_table(
  path: str | Path, *, inside: Path | None = None, strict: bool = True
) -> Table:
  """A whole file; blank lines are left out.

  A JSON object or Parquet row that lacks a column has None there.

  Args:
    path: the file.
    inside: the folder that it belongs to; None for a file that a person names.
    strict: whether bad rows are an error, or else among the table's `bad` ones.

  Raises:
    UserError: it can't be read, has no rows, or some that are wrong; the
      message names their lines.
  """
  format = format_of(path, inside=inside)
  lines = format not in ("parquet", "json")
  names: dict[str, None] = {}
  rows: list[Row] = []
  bad: list[Row] = []
  for row in file_rows(path, format=format, inside=inside):
    if row.error:
      if row.error != BLANK:
        bad.append(row)
      continue
    names |= dict.fromkeys(row.values)
    if not row.header:
      rows.append(row)
  cells = sum(len(row.values) for row in rows)
  if len(names) * len(rows) > max(CELLS, 20 * cells):
    raise UserError(
      f"{path}: its {len(rows):,} rows have {len(names):,} different columns"
      f" ({some(names)}), of which each has a few: is it a table?"
    )
  classes = {}
  if format == "parquet":
    classes = _parquet_classes(local_copy(path), inside)
  table = Table(
    name=str(path),
    columns={name: [row.values.get(name) for row in rows] for name in names},
    numbers=[row.number for row in rows],
    classes=classes,
    lines=lines,
  )
  table = table._replace(
    bad=tuple((x.number, f"{table._place(x.number)}: {x.error}.") for x in bad)
  )
  if strict or not rows:
    refuse_bad_rows([table])
  if not rows:
    raise UserError(f"{path}: the file has no rows.")
  return table


def refuse_bad_rows(tables: Sequence[Table], *, advice: str = "") -> None:
  """All bad rows of some tables in one message.

  Args:
    tables: with the rows that can't be used.
    advice: how to go on without these.

  Raises:
    UserError: there are any; the message shows the first ones of each table.
  """
  messages = []
  for table in tables:
    if not (bad := table.bad):
      continue
    rows = len(table.numbers) + len(bad)
    shown = [reason for _, reason in bad[:SHOWN_ROWS]]
    if len(bad) > len(shown):
      shown.append(f"and {len(bad) - len(shown):,} more")
    head = f"{table.name}: {len(bad):,} of {rows:,} rows can't be used."
    messages.append("\n  ".join([head, *shown]))
  if messages:
    raise UserError("\n".join([*messages, *([advice] if advice else [])]))


def _parquet_classes(path: Path, inside: Path | None) -> dict[str, list[str]]:
  """Names of class ids, which `datasets` keeps in the file's metadata."""
  with open_parquet(path, inside=inside) as file:
    return class_names(stored_features(file, path))


def stored_features(file: Any, path: Path) -> dict[str, Any]:
  """What `datasets` keeps of the columns in a Parquet file's metadata.

  Raises:
    UserError: it can't be read.
  """
  stored = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
  try:
    features = parse_json(stored)["info"]["features"]
  except KeyError:
    return {}
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path}: what `datasets` has written of its columns can't be read:"
      f" {error}"
    ) from error
  return features if isinstance(features, dict) else {}


def some(names: Iterable[str]) -> str:
  """The first names of columns, for a message."""
  names = list(names)
  more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
  return ", ".join(name[:80] for name in names[:SHOWN]) + more


def class_names(features: dict[str, Any]) -> dict[str, list[str]]:
  """The class names of columns, from the features that `datasets` describes."""
  by_column = {}
  for name, feature in features.items():
    while isinstance(feature, list) and feature:  # an older spelling of lists
      feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
      feature = feature["feature"]  # of a list's entries
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
      names = feature.get("names")
      by_column[name] = (
        [str(x) for x in names] if isinstance(names, list) else []
      )
  return {name: words for name, words in by_column.items() if words}
