"""What a missing extra's error tells people to type."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from vera_jax import errors

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
