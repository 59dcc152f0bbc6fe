"""One run, one result.json."""

import jax
import pytest

import vera_jax
from vera_jax import results
from vera_jax.errors import UserError


def test_what_is_written_is_read(tmp_path):
  assert results.read(tmp_path) is None
  given = results.write(tmp_path, {"score": 0.1, "targets": ("a", "b")})
  assert given == {"score": 0.1, "targets": ["a", "b"]}
  assert results.read(tmp_path) == given


def test_all_below_a_folder_in_order(tmp_path):
  for name in ("b", "a/deep", "c"):
    (tmp_path / name).mkdir(parents=True)
    results.write(tmp_path / name, {"name": name})
  (tmp_path / "unfinished").mkdir()
  found = [result["name"] for result in results.read_all(tmp_path)]
  assert found == ["a/deep", "b", "c"]
  assert results.read_all(tmp_path / "unfinished") == []


def test_a_broken_file_is_named(tmp_path):
  (tmp_path / "result.json").write_text('{"score": ')
  with pytest.raises(UserError, match="result.json can't be read"):
    results.read_all(tmp_path)


def test_versions_and_hardware():
  found = results.provenance()
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["vera_jax"] == vera_jax.__version__
  assert found["device"]["platform"] == "cpu"
  assert found["device"]["count"] == 8
