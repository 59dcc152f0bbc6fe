"""Tables of texts, read row by row: CSV, TSV, JSON, JSON lines and Parquet.

A row that can't be read is an entry that says why, so that a reader of many
texts can go on with the next; `read_table` reads a whole file and stops at the
first. Everything is UTF-8. CSV has quotes ("a ""b"", c") and texts of several
lines; in a TSV nothing is quoted, and a tab always ends a cell. A JSON line is
an object with the columns' names as keys, and JSON one list of such objects. A
name that ends in .json may mean either.
"""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.errors import UserError

SUFFIXES = {
  ".csv": "csv",
  ".tsv": "tsv",
  ".jsonl": "jsonl",
  ".ndjson": "jsonl",
  ".json": "jsonl",
  ".parquet": "parquet",
}
FORMATS = (*dict.fromkeys(SUFFIXES.values()), "json")
BLANK = "it is empty"
_PEEK = 4096  # bytes, of which few are blank
csv.field_size_limit(2**31 - 1)  # characters of a cell; Python's is 131,072


class Row(NamedTuple):
  """One row, or what is wrong with it.

  Attributes:
    number: of the line that it begins on; in Parquet and in a list of JSON the
      row's, from 1.
    values: by column; of a header its names, without values.
    error: why there are no values.
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
    numbers: of the rows; a file's lines, where `lines` is set.
    classes: names of a column's class ids, where the file has them.
    lines: whether `numbers` counts lines.
  """

  name: str
  columns: dict[str, list[Any]]
  numbers: list[int]
  classes: dict[str, list[str]] = {}
  lines: bool = True

  def place(self, row: int) -> str:
    """Where a row is, for messages."""
    apart = ":" if self.lines else ", row "
    return f"{self.name}{apart}{self.numbers[row]}"


def format_of(path: str | Path) -> str:
  """The format by the name's ending, or of a .json by whether it is a list.

  Raises:
    UserError: in none that is known.
  """
  path = Path(path).expanduser()
  found = SUFFIXES.get(path.suffix.lower())
  if found is None:
    raise UserError(
      f"{path}: the name doesn't end in {', '.join(SUFFIXES)}, which say how a"
      " table is read."
    )
  if path.suffix.lower() == ".json" and path.is_file():
    with path.open("rb") as file:
      start = file.read(_PEEK).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
      return "json"
  return found


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
    for number, line in enumerate(lines, 1):
      yield _json_row(number, line)
    return
  names: list[str] = []
  for number, cells, error in _cells(lines, quoted=format == "csv"):
    repeated = {name for name in cells if cells.count(name) > 1}
    if not error and cells in ([], [""]):
      error = BLANK
    elif not error and not names and repeated:
      error = f"the column {min(repeated)!r} is there twice"
    elif not error and names and len(cells) != len(names):
      error = (
        f"it has {len(cells)} columns, but the header has {len(names)}"
        f" ({', '.join(names)})"
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


def _json_row(number: int, line: bytes) -> Row:
  try:
    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    if not text.strip():
      return Row(number, error=BLANK)
    values = json.loads(text)
    json.dumps(values, ensure_ascii=False).encode()
  except UnicodeError:  # also half a character, which JSON can write
    return Row(number, error="it is not UTF-8")
  except (ValueError, RecursionError) as wrong:
    return Row(number, error=f"it is no JSON ({wrong})")
  if not isinstance(values, dict):
    return Row(number, error="it is no JSON object")
  return Row(number, values)


def _json_list(content: bytes) -> Iterator[Row]:
  try:
    entries = json.loads(content.decode("utf-8-sig"))
    json.dumps(entries, ensure_ascii=False).encode()
  except UnicodeError:
    yield Row(1, error="it is not UTF-8")
    return
  except (ValueError, RecursionError) as wrong:
    yield Row(1, error=f"it is no JSON ({wrong})")
    return
  for number, values in enumerate(entries, 1):
    if isinstance(values, dict):
      yield Row(number, values)
    else:
      yield Row(number, error="it is no JSON object")


def parquet_rows(path: Path) -> Iterator[Row]:
  """The rows of a Parquet file.

  Raises:
    UserError: the file can't be read.
  """
  import pyarrow
  from pyarrow import parquet

  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches():
        for values in batch.to_pylist():
          number += 1
          yield Row(number, values)
  except (pyarrow.ArrowException, OSError) as error:
    raise UserError(f"{path} can't be read as Parquet: {error}") from error


def file_rows(path: str | Path, *, format: str | None = None) -> Iterator[Row]:
  """The rows of a file, by its name's ending or as the format says.

  Raises:
    UserError: the file can't be read.
  """
  path = Path(path).expanduser()
  format = format or format_of(path)
  if format == "parquet":
    yield from parquet_rows(path)
    return
  try:
    with path.open("rb") as file:
      yield from read_rows(file, format=format)
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error


def read_table(path: str | Path) -> Table:
  """A whole file; blank lines are left out.

  A JSON object or Parquet row that lacks a column has None there.

  Raises:
    UserError: it can't be read, has no rows, or one that is wrong; the message
      names the line.
  """
  format = format_of(path)
  names: dict[str, None] = {}
  rows: list[Row] = []
  for row in file_rows(path, format=format):
    if row.error == BLANK:
      continue
    if row.error:
      apart = ", row " if format == "json" else ":"
      raise UserError(f"{path}{apart}{row.number}: {row.error}.")
    names |= dict.fromkeys(row.values)
    if not row.header:
      rows.append(row)
  if not rows:
    raise UserError(f"{path}: the file has no rows.")
  return Table(
    name=str(path),
    columns={name: [row.values.get(name) for row in rows] for name in names},
    numbers=[row.number for row in rows],
    classes=_parquet_classes(Path(path)) if format == "parquet" else {},
    lines=format not in ("parquet", "json"),
  )


def _parquet_classes(path: Path) -> dict[str, list[str]]:
  """Names of class ids, which `datasets` keeps in the file's metadata."""
  from pyarrow import parquet

  stored = parquet.read_schema(path.expanduser()).metadata or {}
  if b"huggingface" not in stored:
    return {}
  features = json.loads(stored[b"huggingface"]).get("info", {}).get("features")
  return class_names(features or {})


def class_names(features: dict[str, Any]) -> dict[str, list[str]]:
  """The class names of columns, from the features that `datasets` describes."""
  found = {}
  for name, feature in features.items():
    while isinstance(feature, list):  # an older spelling of a list
      feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
      feature = feature["feature"]  # of a list's entries
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
      found[name] = [str(word) for word in feature.get("names") or ()]
  return {name: words for name, words in found.items() if words}
