"""What a missing extra's error tells people to type."""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from vera_jax import errors, results
from vera_jax.data.hub_data import download
from vera_jax.data.tables import read_table

ROOT = Path(__file__).parents[1]


def named() -> set[str]:
  """The extras that the code's errors name."""
  files = [
    x for y in ("vera_jax", "experiments") for x in ROOT.glob(y + "/**/*.py")
  ]
  texts = "".join(file.read_text() for file in files)
  return set(re.findall(r"install\(['\"](\w+)['\"]\)", texts))


@pytest.mark.parametrize("extra", sorted({*named(), "slurm", "ray"}))
def test_the_command_names_an_extra_that_there_is(extra, monkeypatch):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
  assert extras[extra] == {"file": [f"requirements-{extra}.txt"]}

  def missing(name):
    raise PackageNotFoundError(name)

  monkeypatch.setattr("importlib.metadata.distribution", missing)
  command = errors.install(extra)
  assert (ROOT / command.removeprefix("pip install -r ")).is_file()
  there = distribution("jax")
  monkeypatch.setattr("importlib.metadata.distribution", lambda name: there)
  assert errors.install(extra) == f"pip install 'vera_jax[{extra}]'"


def test_a_long_message_keeps_its_beginning_and_its_end():
  text = "It is wrong: " + "x" * 10**6 + ". Mend it."
  shown = str(errors.UserError(text))
  assert len(shown) == 500
  assert shown.startswith("It is wrong: x") and shown.endswith("x. Mend it.")
  assert str(errors.UserError(text[:500])) == text[:500]
  rows = [f"row {number}" for number in range(100)]
  shown = str(errors.UserError("\n".join(rows))).split("\n")
  assert shown == [*rows[:40], "…", *rows[-10:]]


def test_what_a_plain_install_lacks_is_named_where_it_is_needed(
  tmp_path, monkeypatch
):
  for name in ("datasets", "pyarrow", "pyarrow.parquet"):
    monkeypatch.setitem(sys.modules, name, None)
  (tmp_path / "a.parquet").write_bytes(b"PAR1")
  for reads in (
    lambda: read_table(tmp_path / "a.parquet"),
    lambda: download("owner/name", None),
  ):
    with pytest.raises(errors.UserError, match=r"pip install.*datasets"):
      reads()

  def missing(name):
    if name == "datasets":
      raise PackageNotFoundError(name)
    return "1"

  monkeypatch.setattr(results, "version", missing)
  versions = results.provenance()["versions"]
  assert "jax" in versions and "datasets" not in versions
