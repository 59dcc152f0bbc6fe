"""Rows of files: what is read, and what is said of a row that can't be."""

import os
import time

import pytest

from vera_jax.data import tables
from vera_jax.data.tables import file_rows, read_rows, read_table
from vera_jax.errors import UserError


def rows(text: bytes, format: str):
  return list(read_rows(text.splitlines(keepends=True), format=format))


def test_csv_has_quotes_and_texts_of_several_lines(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(b'\xef\xbb\xbftext,label\r\n"a ""b"",\nc",x\r\nd,y\r\n\r\n')
  table = read_table(path)
  assert table.columns == {"text": ['a "b",\nc', "d"], "label": ["x", "y"]}
  assert [table.place(i) for i in (0, 1)] == [f"{path}:2", f"{path}:4"]
  path.write_text(f"text\n{'x' * 131_073}\n")  # Python's own limit, and one
  assert len(read_table(path).columns["text"][0]) == 131_073


def test_nothing_is_quoted_in_a_tsv(tmp_path):
  path = tmp_path / "a.tsv"
  path.write_text('text\tlabel\nHe said "it is\t1\n"a\t"\n')
  assert read_table(path).columns["text"] == ['He said "it is', '"a']


def test_json_lines_may_lack_a_column(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "a", "label": [1, 2]}\n\n{"text": "b"}\n')
  table = read_table(path)
  assert table.columns == {"text": ["a", "b"], "label": [[1, 2], None]}
  assert table.place(1) == f"{path}:3"


def test_a_json_file_is_a_list_or_has_lines(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('\ufeff [\n{"text": "a"},\n{"text": "b", "n": 1}]\n')
  table = read_table(path)
  assert table.columns == {"text": ["a", "b"], "n": [None, 1]}
  assert table.place(1) == f"{path}, row 2"
  path.write_text('{"text": "a"}\n{"text": "b"}\n')
  assert read_table(path).place(1) == f"{path}:2"
  for content, error in (
    ('[{"text": "a"}, 3]', "row 2: it is no JSON object"),
    ('[{"text": "a"}', "row 1: it is no JSON \\("),
    ("[]", "the file has no rows"),
  ):
    path.write_text(content)
    with pytest.raises(UserError, match=f"a.json.*{error}"):
      read_table(path)


def test_parquet_keeps_types_and_class_names(tmp_path):
  import datasets

  path = tmp_path / "a.parquet"
  names = datasets.ClassLabel(names=["no", "yes"])
  features = {"text": datasets.Value("string"), "label": names}
  features["tags"] = datasets.List(names)
  data = {"text": ["a", "b"], "label": [1, 0], "tags": [[0], [1, 1]]}
  features = datasets.Features(features)
  datasets.Dataset.from_dict(data, features=features).to_parquet(path)
  table = read_table(path)
  assert table.columns == data
  assert table.classes == dict.fromkeys(("label", "tags"), ["no", "yes"])
  assert table.place(1) == f"{path}, row 2"


@pytest.mark.parametrize(
  "format, line, error",
  [
    ("csv", b"x,y,z", "it has 3 columns, but the header has 2 (a, b)"),
    ("csv", b"\xff,y", "it is not UTF-8"),
    ("csv", b'"x"z,y', "it is no CSV"),
    ("tsv", b"x\ty\tz", "it has 3 columns, but the header has 2 (a, b)"),
    ("jsonl", b"{", "it is no JSON ("),
    ("jsonl", b'{"a": "\\ud800"}', "it is not UTF-8"),
    ("jsonl", b"[" * 10**5, "it is no JSON ("),
  ],
)
def test_the_rest_goes_on_behind_a_bad_row(format, line, error, tmp_path):
  good = b'{"a": "1", "b": "2"}' if format == "jsonl" else b"1,2"
  header = b"" if format == "jsonl" else b"a,b\n"
  if format == "tsv":
    good, header = good.replace(b",", b"\t"), header.replace(b",", b"\t")
  text = header + b"\n".join([good, line, good, b""])
  number = 3 if header else 2
  bad = [row for row in rows(text, format) if row.error]
  assert [row.number for row in bad] == [number]
  assert bad[0].error.startswith(error)
  last = rows(text, format)[-1]
  assert last.values == {"a": "1", "b": "2"} and last.number == number + 1
  path = tmp_path / f"x.{format}"
  path.write_bytes(text)
  with pytest.raises(UserError, match=rf"x\.{format}:{number}: "):
    read_table(path)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.csv", "x,y,x\n1,2,3\n", ":1: the column 'x' is there twice"),
    ("a.csv", "x,y\n", "the file has no rows"),
    ("a.csv", 'x,y\n1,2\n"3,4\n5,6\n', ":3: it is no CSV"),
    ("a.parquet", "no", "can't be read as Parquet"),
    ("a.txt", "a", "doesn't end in .csv, .tsv, .jsonl"),
  ],
)
def test_a_file_that_is_no_table(name, text, message, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message):
    read_table(tmp_path / name)


def test_a_missing_file(tmp_path):
  with pytest.raises(UserError, match="There is no .*no.csv"):
    read_table(tmp_path / "no.csv")


def test_a_wide_table_takes_no_longer_than_its_cells(tmp_path):
  path = tmp_path / "a.csv"
  names = ",".join(f"c{i}" for i in range(60_000))
  path.write_text(f"{names}\n" + "1,2\n" * 3)
  start = time.process_time()
  header, *bad = file_rows(path)
  assert time.process_time() - start < 5  # 70 s each, when it was quadratic
  assert len(header.values) == 60_000 and all(row.error for row in bad)
  assert len(bad[0].error) < 500


def test_rows_that_have_no_columns_together(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, "CELLS", 100)
  path = tmp_path / "a.jsonl"
  path.write_text("".join(f'{{"c{i}": 1}}\n' for i in range(50)))
  with pytest.raises(UserError, match="50 rows have 50 different columns"):
    read_table(path)


def test_a_parquet_file_is_no_more_than_it_shows(tmp_path, monkeypatch):
  import pyarrow as pa
  from pyarrow import parquet

  path = tmp_path / "a.parquet"
  column = pa.array(["x" * 1000]).take(pa.array([0] * 5000))
  parquet.write_table(pa.table({"text": column}), path)
  assert path.stat().st_size < 5000
  assert len(read_table(path).numbers) == 5000  # the same cell often is fine
  monkeypatch.setattr(tables, "UNPACKED", 10**6)
  with pytest.raises(UserError, match="repeats long cells"):
    list(file_rows(path))
  monkeypatch.setattr(tables, "ROWS", 1000)
  with pytest.raises(UserError, match="would become 5,000 rows"):
    list(file_rows(path))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_a_table_is_a_regular_file(name, tmp_path):
  (tmp_path / name).symlink_to("/dev/zero")
  with pytest.raises(UserError, match="it is a device, not a regular file"):
    read_table(tmp_path / name)
  (tmp_path / name).unlink()
  os.mkfifo(tmp_path / name)
  with pytest.raises(UserError, match="it is a pipe, not a regular file"):
    read_table(tmp_path / name)


def test_what_datasets_wrote_of_the_columns_may_be_damaged(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  path = tmp_path / "a.parquet"
  for about, words in (
    (b"[" * 20_000, "nested too deeply"),
    (b'{"info": 3}', "can't be read"),
    (b'{"info": {"features": {"x": []}}}', None),
  ):
    table = pa.table({"x": [1]}).replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, path)
    if words is None:
      assert read_table(path).classes == {}
    else:
      with pytest.raises(UserError, match=words):
        read_table(path)
