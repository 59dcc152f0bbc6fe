"""Lines of text to predict: headers, columns, keys, and what is wrong."""

import pytest

from vera_jax.data.tables import read_rows
from vera_jax.data.texts import Line, read_lines, read_texts
from vera_jax.errors import UserError


def read(text, format="tsv", **options):
  data = text if isinstance(text, bytes) else text.encode()
  return list(read_lines(data.splitlines(True), format=format, **options))


def test_a_tsv_without_header_is_all_text():
  assert read("a b\nc\r\n") == [Line(1, ("a b",)), Line(2, ("c",))]
  assert read("a\tb\n")[0].texts == ("a", "b")


@pytest.mark.parametrize(
  "header, columns, texts",
  [
    ("sentence\tlabel", None, ("0",)),
    ("index\tsentence1\tsentence2\tlabel", None, ("1", "2")),
    ("index\tquestion\tsentence\tlabel", ("question", "sentence"), ("1", "2")),
  ],
)
def test_a_header_says_where_the_texts_are(header, columns, texts):
  options = {"columns": [columns], "count": 2} if columns else {}
  lines = read(f"{header}\n0\t1\t2\t3\t4\n", **options)
  assert lines[0] == Line(1, header=True)
  assert lines[1] == Line(2, texts)


def test_a_byte_order_mark_is_no_text_but_quotes_are():
  lines = read('\N{ZERO WIDTH NO-BREAK SPACE}sentence\n"a" said')
  assert lines == [Line(1, header=True), Line(2, ('"a" said',))]


@pytest.mark.parametrize(
  "line, texts",
  [
    ('{"sentence": "a"}', ("a",)),
    ('{"text": "a", "label": 1}', ("a",)),
    ('{"sentence2": "b", "sentence1": "a"}', ("a", "b")),
  ],
)
def test_the_keys_of_jsonl(line, texts):
  assert read(line, "jsonl") == [Line(1, texts)]


@pytest.mark.parametrize(
  "format, line, words",
  [
    ("tsv", b"a\tb\n", "2 columns, 1 expected"),
    ("tsv", b"\n", "empty"),
    ("jsonl", b"nope\n", "no JSON"),
    ("jsonl", b'{"sentence": 3}\n', "no text under sentence, or text"),
  ],
)
def test_a_bad_line_is_named_and_the_rest_goes_on(format, line, words):
  good = b"good\n" if format == "tsv" else b'{"text": "good"}\n'
  lines = read(good + line + good, format)
  assert [bool(found.error) for found in lines] == [False, True, False]
  assert lines[1].number == 2 and words in lines[1].error
  assert lines[2].texts == ("good",)


def from_table(text, format="csv", columns=()):
  rows = read_rows(text.encode().splitlines(True), format=format)
  return list(read_texts(rows, columns=columns))


def test_a_table_has_its_texts_in_columns():
  text = 'n,text\n1,"a, b"\n2\n3, \n4,c\n'
  header, *lines = from_table(text)
  assert header == Line(1, header=True)
  assert [line.texts for line in lines] == [("a, b",), (), (), ("c",)]
  assert lines[0].number == 2
  assert [line.error for line in lines[1:3]] == [
    "it has 1 columns, but the header has 2 (n, text)",
    "a text is empty",
  ]
  lines = '{"a": "x", "b": ["y", "z"]}\n{"a": "x"}\n'
  pair = from_table(lines, "jsonl", [("a", "b")])
  assert pair[0].texts == ("x", ["y", "z"])
  assert pair[1].error == "it has no text under a and b"
  with pytest.raises(UserError, match="no column text; its columns are a, b"):
    from_table("a,b\n", columns=[("text",)])
