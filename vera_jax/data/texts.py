"""Texts to predict, line by line: TSV or JSONL, one or two texts a line.

A TSV's first line is a header if it names the text columns; other columns are
then ignored, so that GLUE's own files can be read. Without a header the lines
hold the texts and nothing else. The names, in a header and as JSONL's keys:
sentence or text; sentence1 and sentence2; or the task's own (QNLI: question and
sentence). Nothing is quoted or escaped in a TSV.
"""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vera_jax.tasks.glue import Task

FORMATS = ("tsv", "jsonl")
SINGLE = (("sentence",), ("text",))
PAIRS = (("sentence1", "sentence2"),)
Texts = tuple[str, ...]


class Line(NamedTuple):
  """One input line: its texts, or what is wrong with it.

  `header` marks the names of a TSV's columns, which are no texts.
  """

  number: int
  texts: Texts = ()
  error: str = ""
  header: bool = False


def column_names(task: Task | None, count: int | None) -> tuple[Texts, ...]:
  """The sets of names that the text columns may have, most telling first."""
  own = (task.columns, task.file_columns) if task else ()
  known = dict.fromkeys((*own, *PAIRS, *SINGLE))
  return tuple(names for names in known if count in (None, len(names)))


def read_lines(
  lines: Iterable[bytes],
  *,
  format: str,
  task: Task | None = None,
  count: int | None = None,
) -> Iterator[Line]:
  """Each line's texts, in order; a bad line is an entry with its `error`.

  Args:
    lines: undecoded, as a binary file gives them.
    format: a name in `FORMATS`.
    task: whose columns' names are understood too.
    count: texts a line, 1 or 2; None: as many as the first good line has.
  """
  columns: tuple[int, ...] | None = None
  for number, raw in enumerate(lines, 1):
    line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    try:
      text = line.decode().rstrip("\r\n")
      if format == "tsv" and number == 1:
        columns = _header(text, column_names(task, count))
        if columns is not None:
          count = len(columns)
          yield Line(number, header=True)
          continue
      if not text.strip():
        raise ValueError("it is empty")
      names = column_names(task, count)
      texts = (
        _from_json(text, names)
        if format == "jsonl"
        else _from_cells(text.split("\t"), columns, count)
      )
      _check(texts)
    except ValueError as error:
      yield Line(number, error=_reason(error))
    else:
      count = len(texts)
      yield Line(number, texts)


def _header(text: str, names: tuple[Texts, ...]) -> tuple[int, ...] | None:
  """Where the text columns stand; None if the line is no header."""
  cells = text.split("\t")
  for chosen in names:
    if all(cells.count(name) == 1 for name in chosen):
      return tuple(map(cells.index, chosen))
  return None


def _from_cells(
  cells: list[str], columns: tuple[int, ...] | None, count: int | None
) -> Texts:
  if columns is not None:
    if len(cells) <= max(columns):
      raise ValueError(
        f"it has {len(cells)} columns, but the header puts a text into column"
        f" {max(columns) + 1}"
      )
    return tuple(cells[i] for i in columns)
  allowed = (1, 2) if count is None else (count,)
  if len(cells) not in allowed:
    wanted = " or ".join(map(str, allowed))
    raise ValueError(f"it has {len(cells)} columns, {wanted} expected")
  return tuple(cells)


def _from_json(text: str, names: tuple[Texts, ...]) -> Texts:
  try:
    fields = json.loads(text)
  except ValueError as error:
    raise ValueError(f"it is no JSON ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError("it is no JSON object")
  for chosen in names:
    if all(isinstance(fields.get(name), str) for name in chosen):
      return tuple(fields[name] for name in chosen)
  wanted = ", or ".join(" and ".join(chosen) for chosen in names)
  raise ValueError(f"it has no text under {wanted}")


def _check(texts: Texts) -> None:
  for text in texts:
    text.encode()  # JSON can hold half a character, which is no text
    if not text.strip():
      raise ValueError("a text is empty")


def _reason(error: ValueError) -> str:
  return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
