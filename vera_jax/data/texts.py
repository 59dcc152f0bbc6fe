"""Texts to predict, line by line: TSV or JSONL, one or two texts per line, or
as many as the caller's columns are.

The first line of a TSV is a header if it names the text columns; other columns
are then ignored, so that a data set's own files can be read. Without a header
the lines hold the texts and nothing else. The names, in a header and as keys in
JSONL, are sentence or text, or sentence1 and sentence2, or those that the
caller adds (for QNLI: question and sentence). Nothing is quoted or escaped in a
TSV.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vera_jax.data.tables import Row, some
from vera_jax.errors import UserError
from vera_jax.files import parse_json

# Each text is a string; for tagging it may also be the list of its words.
Texts = tuple[Any, ...]
NAMES = (("sentence1", "sentence2"), ("sentence",), ("text",))


class Line(NamedTuple):
  """One input line: its texts, or what is wrong with it.

  `header` marks the line that names a TSV's columns and has no texts.
  """

  number: int
  texts: Texts = ()
  error: str = ""
  header: bool = False


def read_lines(
  lines: Iterable[bytes],
  *,
  format: str,
  columns: Sequence[Texts] = (),
  count: int | None = None,
  check: Callable[..., Any] | None = None,
) -> Iterator[Line]:
  """Each line's texts, in order; a bad line is an entry with its `error`.

  Args:
    lines: undecoded, as a binary file gives them.
    format: "tsv" or "jsonl".
    columns: further names that the text columns may have, tried before
      `NAMES`; each entry names the columns of one line.
    count: texts per line; None: as many as the first good line has, 1 or 2.
    check: called with a line's texts; its ValueError is the line's `error`.
  """
  places: list[int] | None = None  # of the text columns, from the header
  for number, line in enumerate(lines, 1):
    known = [
      names
      for names in dict.fromkeys((*columns, *NAMES))
      if count in (None, len(names))
    ]
    try:
      # A byte order mark may stand before the first line.
      text = line.decode("utf-8-sig" if number == 1 else "utf-8")
      text = text.rstrip("\r\n")
      cells = text.split("\t")
      if format == "tsv" and number == 1:
        for names in known:
          if all(cells.count(name) == 1 for name in names):
            places = [cells.index(name) for name in names]
            break
      if places and number == 1:
        count = len(places)
        yield Line(number, header=True)
        continue
      if not text.strip():
        raise ValueError("it is empty")
      if format == "jsonl":
        texts = _from_json(text, known)
      else:
        texts = _from_cells(cells, places, count)
      for part in texts:
        part.encode()  # JSON can hold half a character, which is no text
        if not part.strip():
          raise ValueError("a text is empty")
      if check is not None:
        check(*texts)
    except UnicodeError:
      yield Line(number, error="it is not UTF-8")
    except ValueError as error:
      yield Line(number, error=str(error))
    else:
      count = len(texts)
      yield Line(number, texts)


def read_texts(
  rows: Iterable[Row],
  *,
  columns: Sequence[Texts] = (),
  check: Callable[..., Any] | None = None,
) -> Iterator[Line]:
  """Each row's texts, from the columns of a table; a bad row has its `error`.

  Args:
    rows: as `tables.file_rows` gives them.
    columns: names that the text columns may have; the first that are there
      count. () for `NAMES`.
    check: as for `read_lines`.

  Raises:
    UserError: the table has none of them.
  """
  known = tuple(dict.fromkeys(columns or NAMES))
  wanted = ", or ".join(" and ".join(names) for names in known)
  for row in rows:
    names = next((n for n in known if set(n) <= set(row.values)), None)
    if row.header and names is None:
      raise UserError(
        f"The table has no column {wanted}; its columns are {some(row.values)}."
      )
    texts: Texts = tuple(row.values[name] for name in names or ())
    error = row.error
    if not error and names is None:
      error = f"it has no text under {wanted}"
    for text in () if row.header else texts:
      parts = text if isinstance(text, list) and text else [text]
      if not all(isinstance(part, str) for part in parts):
        error = f"it has no text under {wanted}"
      elif not all(part.strip() for part in parts):
        error = "a text is empty"
    if check is not None and not error and not row.header:
      try:
        check(*texts)
      except ValueError as wrong:
        error = str(wrong)
    if error or row.header:
      yield Line(row.number, error=error, header=row.header)
    else:
      yield Line(row.number, texts)


def _from_cells(
  cells: list[str], places: list[int] | None, count: int | None
) -> Texts:
  if places is not None:
    if len(cells) <= max(places):
      raise ValueError(
        f"it has {len(cells)} columns, but the header puts a text into column"
        f" {max(places) + 1}"
      )
    return tuple(cells[i] for i in places)
  allowed = (1, 2) if count is None else (count,)
  if len(cells) not in allowed:
    wanted = " or ".join(map(str, allowed))
    raise ValueError(f"it has {len(cells)} columns, {wanted} expected")
  return tuple(cells)


def _from_json(text: str, known: Sequence[Texts]) -> Texts:
  try:
    fields = parse_json(text)
  except UnicodeError:
    raise
  except ValueError as error:
    raise ValueError(f"it is no JSON ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError("it is no JSON object")
  for names in known:
    if all(isinstance(fields.get(name), str) for name in names):
      return tuple(fields[name] for name in names)
  wanted = ", or ".join(" and ".join(names) for names in known)
  raise ValueError(f"it has no text under {wanted}")
