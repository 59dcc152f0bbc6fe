"""E2E's files are read as its scorer and microsoft/LoRA read them."""

import gzip

import pytest

from vera_jax.data.written import FOLDER, read_written, write_written
from vera_jax.errors import UserError
from vera_jax.tasks.e2e_files import (
  Pairs,
  read_for_scoring,
  read_split,
)

TABLE = "mr,ref\n{}\n"


def write(folder, **files):
  """`a_txt="..."` is a.txt."""
  paths = []
  for name, text in files.items():
    paths.append(folder / name.replace("_", "."))
    paths[-1].write_text(text, encoding="utf-8")
  return paths


def test_rows_and_their_groups(tmp_path):
  text = "name : A | x||One . \nname : A | x||Two .\nname : B||Three .\n"
  (tmp_path / "train.txt").write_text(text)
  rows = read_split(tmp_path, "train")
  assert rows == Pairs(
    ["name : A | x", "name : A | x", "name : B"], ["One .", "Two .", "Three ."]
  )
  groups = {"name : A | x": ["One .", "Two ."], "name : B": ["Three ."]}
  assert rows.grouped() == groups
  assert rows.take([2]) == Pairs(["name : B"], ["Three ."])
  (tmp_path / "valid.txt.gz").write_bytes(gzip.compress(text.encode()))
  assert read_split(tmp_path, "valid") == rows


@pytest.mark.parametrize(
  "text, message",
  [
    ("a||b\nno text\n", r"train.txt:2: a line has an input"),
    ("a||b||c\n", "train.txt:1"),
    ("\n\n", "train.txt is empty"),
    (b"a||\xff\n", "train.txt can't be read: 'utf-8'"),
  ],
)
def test_lines_that_are_no_rows(text, message, tmp_path):
  data = text if isinstance(text, bytes) else text.encode()
  (tmp_path / "train.txt").write_bytes(data)
  with pytest.raises(UserError, match=message):
    read_split(tmp_path, "train")


def test_a_split_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="no file .*train.txt. A folder for E2E"):
    read_split(tmp_path, "train")


def test_what_is_written_is_read_again(tmp_path):
  groups = {"one": ["a b", "c"], "two": ["é"], "three": ["d"]}
  write_written(tmp_path, ["x\ny", "", ""], groups)
  folder = tmp_path / FOLDER
  found = read_for_scoring(folder / "outputs.txt", folder / "references.txt")
  assert found == (["x y", "", ""], list(groups.values()))
  assert (folder / "inputs.txt").read_text() == "one\ntwo\nthree\n"
  written = read_written(tmp_path)
  assert list(written.outputs.values()) == found[0]
  assert written.references == groups


def test_lines_without_groups_are_one_reference_each(tmp_path):
  paths = write(tmp_path, o_txt="a\nb\n", r_txt="\ufeffc\r\nd\r\n\n")
  assert read_for_scoring(*paths) == (["a", "b"], [["c"], ["d"]])


def test_tables_are_joined_by_their_inputs(tmp_path):
  """With quotes in TSV files too, and letters that were decoded wrongly."""
  outputs, references = write(
    tmp_path,
    o_tsv='MR\toutput\n"b, c"\tfor Ł20\n\na\tcafÃ©\n',
    r_csv=TABLE.format('a,"one, Â£5"\n"b, c",two\na,three'),
  )
  assert read_for_scoring(outputs, references) == (
    ["for £20", "café"],
    [["two"], ["one, £5", "three"]],
  )


def test_cells_between_single_quotes(tmp_path):
  """As tnt1 and tnt2 were handed in; one cell without them is a text's own."""
  quoted = "MR\toutput\n'a, b'\t'It's \"one\".'\n'c'\t''\n"
  paths = write(tmp_path, o_tsv=quoted, r_csv=TABLE.format('"a, b",1\nc,2'))
  assert read_for_scoring(*paths) == (['It\'s "one".', ""], [["1"], ["2"]])
  paths = write(tmp_path, o_tsv=f"{quoted}d\t'x'\n", r_txt="1\n2\n3\n")
  assert read_for_scoring(*paths)[0][2] == "'x'"


def test_a_table_of_references_for_lines_of_outputs(tmp_path):
  """Without inputs the rows that follow one another make the groups."""
  paths = write(
    tmp_path, o_txt="x\ny\nz\n", r_csv=TABLE.format("a,1\na,2\nb,3\na,4")
  )
  assert read_for_scoring(*paths)[1] == [["1", "2"], ["3"], ["4"]]


@pytest.mark.parametrize(
  "files, message",
  [
    (dict(o_txt="a\n", r_txt="b\n\nc\n"), "1 outputs, but .* for 2 inputs"),
    (dict(o_txt="a\nb\n", r_txt="c\n\nd\n\n\ne\n"), r"r.txt:5: an empty line"),
    (dict(o_txt="a\n", r_txt="\n"), "r.txt is empty"),
    (dict(o_csv="mr,ref\nx,a\n", r_csv="mr,ref\ny,b\n"), "no reference"),
    (dict(o_csv=TABLE.format("x,a,b"), r_txt="b\n"), "row 2 has others"),
  ],
)
def test_files_that_can_not_be_scored(files, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read_for_scoring(*write(tmp_path, **files))
