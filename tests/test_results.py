"""One run, one result.json."""

import jax

import vera_jax
from vera_jax import results


def test_what_is_written_is_read(tmp_path):
  assert results.read(tmp_path) is None
  given = results.write(tmp_path, {"score": 0.1, "targets": ("a", "b")})
  assert given == {"score": 0.1, "targets": ["a", "b"]}
  assert results.read(tmp_path) == given


def test_versions_and_hardware():
  found = results.provenance()
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["vera_jax"] == vera_jax.__version__
  assert found["device"]["platform"] == "cpu"
  assert found["device"]["count"] == 8
