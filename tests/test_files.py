"""JSON objects: a clear error for each kind of damage; whole or not at all."""

import json

import pytest

from vera_jax.errors import UserError
from vera_jax.files import read_json, write_json


def test_an_object_is_read(tmp_path):
  file = tmp_path / "x.json"
  file.write_text('{"a": [1, "é"]}', encoding="utf-8")
  assert read_json(file) == {"a": [1, "é"]}


@pytest.mark.parametrize(
  "data, words",
  [
    (None, "There is no .*x.json"),
    (b"", "x.json can't be read as JSON: Expecting value"),
    (b'{"a": 1', "x.json can't be read as JSON: Expecting"),
    (b"\xff{}", "x.json can't be read as JSON: 'utf-8'"),
    (b"[1]", "x.json can't be read: it is not a JSON object"),
    (b"null", "x.json can't be read: it is not a JSON object"),
  ],
)
def test_damage_is_named_with_the_hint(data, words, tmp_path):
  file = tmp_path / "x.json"
  if data is not None:
    file.write_bytes(data)
  with pytest.raises(UserError, match=rf"^.*{words}.*\. Copy it again\.$"):
    read_json(file, hint="Copy it again.")


def test_a_folder_is_no_file(tmp_path):
  with pytest.raises(UserError, match="can't be read: Is a directory.$"):
    read_json(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
  tmp_path, monkeypatch
):
  path = tmp_path / "x.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})

  def full(handle):
    raise OSError("no space left")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="no space left"):
    write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path]
