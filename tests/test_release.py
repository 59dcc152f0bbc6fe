"""One version, said in one place, and what a release is made of."""

import re
from pathlib import Path

import yaml

from vera_jax.version import __version__

ROOT = Path(__file__).parents[1]


def test_the_newest_changes_are_those_of_this_version():
  changes = (ROOT / "CHANGELOG.md").read_text()
  headings = re.findall(r"^## (.*)$", changes, re.MULTILINE)
  # what the workflow that publishes looks for, less its date
  day = r"(unreleased|\d{4}-\d{2}-\d{2})"
  assert re.match(rf"{re.escape(__version__)} \({day}\)", headings[0])
  versions = [heading.split()[0] for heading in headings]
  assert len({*versions}) == len(versions)


def test_the_version_is_written_once():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  project = (ROOT / "pyproject.toml").read_text()
  assert "version" not in citation
  assert not re.search(r'^version = "', project, re.MULTILINE)
