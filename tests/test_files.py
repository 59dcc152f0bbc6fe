"""One reader of JSON objects, one clear error for each kind of damage."""

import pytest

from vera_jax.errors import UserError
from vera_jax.files import read_json


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
def test_damage_is_told_with_the_hint(data, words, tmp_path):
  file = tmp_path / "x.json"
  if data is not None:
    file.write_bytes(data)
  with pytest.raises(UserError, match=rf"^.*{words}.*\. Copy it again\.$"):
    read_json(file, hint="Copy it again.")


def test_a_folder_is_no_file(tmp_path):
  with pytest.raises(UserError, match="can't be read: Is a directory.$"):
    read_json(tmp_path)
