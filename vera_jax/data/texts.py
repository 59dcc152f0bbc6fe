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
from vera_jax.files import BLANK, json_lines

# Each text is a string; for tagging it may also be the list of its words.
Texts = tuple[Any, ...]
NAMES = (("sentence1", "sentence2"), ("sentence",), ("text",))


class Line(NamedTuple):
  """One input line: its texts, or what is wrong with it.

  `header` marks the line that names a table's columns and has no texts.
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
    count: how many texts a line has; None for as many as the first good line
      has, 1 or 2.
    check: called with a line's texts; its ValueError is the line's `error`.
  """
  known = [
    names
    for names in dict.fromkeys((*columns, *NAMES))
    if count in (None, len(names))
  ]
  if format == "tsv":
    rows = _tsv_rows(lines, known)
  else:
    rows = (Row(*line) for line in json_lines(lines))
  return read_texts(rows, columns=known, check=check, alike=True)


def read_texts(
  rows: Iterable[Row],
  *,
  columns: Sequence[Texts] = (),
  check: Callable[..., Any] | None = None,
  alike: bool = False,
) -> Iterator[Line]:
  """Each row's texts, from the columns of a table; a bad row has its `error`.

  Args:
    rows: as `tables.file_rows` gives them.
    columns: names that the text columns may have; the first that are there
      count. () for `NAMES`.
    check: called with a row's texts; its ValueError is the row's `error`.
    alike: whether all rows must have as many texts as the first good one.

  Raises:
    UserError: the table has none of them.
  """
  known = list(dict.fromkeys(columns or NAMES))
  for row in rows:
    wanted = ", or ".join(" and ".join(names) for names in known)
    names = next((n for n in known if set(n) <= set(row.values)), None)
    if row.header:
      if names is None:
        raise UserError(
          f"The table has no column {wanted}; its columns are"
          f" {some(row.values)}."
        )
      yield Line(row.number, header=True)
      continue
    texts: Texts = tuple(row.values[name] for name in names or ())
    error = row.error
    if not error and names is None:
      error = f"it has no text under {wanted}"
    for text in texts:
      parts = text if isinstance(text, list) and text else [text]
      if not all(isinstance(part, str) for part in parts):
        error = f"it has no text under {wanted}"
      elif not all(part.strip() for part in parts):
        error = "a text is empty"
    if check is not None and not error:
      try:
        check(*texts)
      except ValueError as wrong:
        error = str(wrong)
    if error:
      yield Line(row.number, error=error)
    else:
      yield Line(row.number, texts)
      if alike:
        known = [names for names in known if len(names) == len(texts)]


def _tsv_rows(lines: Iterable[bytes], known: Sequence[Texts]) -> Iterator[Row]:
  """The rows of a TSV, whose header may be missing.

  Without one a line's cells have the known names of as many columns.
  """
  by_count = {len(names): names for names in reversed(known)}
  places: dict[str, int] = {}  # the text columns' numbers, from the header
  for number, line in enumerate(lines, 1):
    try:
      # a byte order mark may stand before the first line
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeError:
      yield Row(number, error="it is not UTF-8")
      continue
    cells = text.split("\t")
    header = next((n for n in known if all(cells.count(x) == 1 for x in n)), ())
    if number == 1 and header:
      places = {name: cells.index(name) for name in header}
      yield Row(number, dict.fromkeys(header), header=True)
    elif not text.strip():
      yield Row(number, error=BLANK)
    elif places:
      last = max(places.values())
      if len(cells) <= last:
        yield Row(
          number,
          error=f"it has {len(cells)} columns, but the header puts a text into"
          f" column {last + 1}",
        )
      else:
        yield Row(number, {name: cells[i] for name, i in places.items()})
    elif len(cells) in by_count:
      yield Row(number, dict(zip(by_count[len(cells)], cells, strict=True)))
      if all(map(str.strip, cells)):  # a good line, and the others are alike
        by_count = {len(cells): by_count[len(cells)]}
    else:
      wanted = " or ".join(map(str, sorted(by_count)))
      yield Row(number, error=f"it has {len(cells)} columns, {wanted} expected")
